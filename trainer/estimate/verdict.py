"""From a configuration to an answer: how much, does it fit, and what to change if it does not.

`estimate_training` is what `estimate` prints and what `train` asks before it loads anything.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import read_model_config
from trainer.config import TrainConfig, default_home
from trainer.estimate.activations import Pass
from trainer.estimate.blank import blank_shape
from trainer.estimate.ladder import Rung, rung_of, rungs
from trainer.estimate.models import Models, RewardModel
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows, largest_pass
from trainer.estimate.shape import ModelShape, shape_of
from trainer.estimate.training import Device, Needs, training_needs
from trainer.estimate.weights import file_bytes
from trainer.estimate.zero_plan import ZeroPlan, zero_plan
from trainer.examples.base_facts import limits_of
from trainer.options.checks import PREFIX_METHODS, WHOLE_METHODS
from trainer.stages.reward_source import find_reward

# Smallest change first. An option that already has the value is left out.
CURES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"per_device_train_batch_size": 1},
    {"finetuning_type": "lora"},
    {"bf16": True},
    {"finetuning_type": "qlora"},
    {"max_length": 1024},
    {"max_length": 512},
)


@dataclass(frozen=True)
class TrainingEstimate:
    """`rungs` is empty on a CPU. `chosen`: the rung that the configuration asks for, or the plain run.

    `not_judged`: why it cannot be said whether the run fits; empty where it can.
    """

    config: TrainConfig
    models: Models
    run: Pass
    needs: Needs
    room: Room
    rungs: tuple[Rung, ...]
    chosen: Rung | None
    knows_rows: bool
    not_judged: str = ""

    @property
    def shape(self) -> ModelShape:
        return self.models.shape

    @property
    def bytes(self) -> int:
        """Of one device at the peak; on a CPU of all processes together."""
        return self.chosen.device if self.chosen else self.needs.peak * self._processes

    @property
    def least_bytes(self) -> int:
        """`bytes` without what the kernel would give back before memory ran out."""
        return self.chosen.device if self.chosen else self.needs.least_peak * self._processes

    @property
    def fits(self) -> bool:
        """True where it is not judged: nothing is known against the run."""
        if self.not_judged:
            return True
        return self._fits(self.chosen) if self.chosen else self.bytes <= self.room.device

    @property
    def first_fit(self) -> Rung | None:
        """Left to right on the ladder."""
        return next((rung for rung in self.rungs if self._fits(rung)), None)

    @property
    def _processes(self) -> int:
        """That share the device."""
        return self.config.num_processes or 1 if self.room.on_cpu else 1

    def _fits(self, rung: Rung) -> bool:
        return not rung.refused and rung.device <= self.room.device and rung.host <= self.room.host


def read_shape(base: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Raises ConfigError."""
    config = read_model_config(base)
    found = shape_of(config)
    return found if found is not None else blank_shape(base, config, trust_remote_code=trust_remote_code)


def read_models(config: TrainConfig, base: Path, home: Home | None = None) -> Models:
    """`home`: where the run of a reward model is looked for; else the environment's. Raises ConfigError."""
    shape = read_shape(base, trust_remote_code=config.trust_remote_code)
    if config.stage != "ppo":
        return Models(shape)
    try:
        return Models(shape, _read_reward(config, home or Home(default_home())))
    except ConfigError as error:
        # It may be planned and not trained yet; a run without it says so itself.
        return Models(shape, unknown=str(error))


def _read_reward(config: TrainConfig, home: Home) -> RewardModel:
    source = find_reward(config, home)
    return RewardModel(read_shape(source.model), file_bytes(source.adapter) if source.adapter else 0)


def estimate_training(
    config: TrainConfig, base: Path, room: Room, rows: Rows, device: Device, models: Models | None = None
) -> TrainingEstimate:
    """Reads config.json, run.json of a reward model, and file sizes only. Raises ConfigError."""
    models = models or read_models(config, base)
    run = largest_pass(
        config,
        rows,
        most=limits_of(config, base).max_length,
        num_ranks=max(1, room.num_gpus),
        on_cpu=room.on_cpu,
    )

    def needs(*, by_deepspeed: bool) -> Needs:
        return training_needs(config, models.shape, base, run, device, reward=models.reward, by_deepspeed=by_deepspeed)

    plan, plain = _plan(config), needs(by_deepspeed=False)
    ladder, chosen = tuple[Rung, ...](), None
    if not room.on_cpu:
        divided = needs(by_deepspeed=True)
        ladder = rungs(plain, divided, room.num_gpus, room.num_machines)
        chosen = None if plan.uses_nvme else rung_of(plan, plain, divided, room.num_gpus, room.num_machines)
    nvme = f"{config.deepspeed} moves to NVMe, which is not counted" if plan.uses_nvme else ""
    not_judged = models.unknown or nvme
    return TrainingEstimate(config, models, run, plain, room, ladder, chosen, bool(rows.lengths), not_judged)


def _plan(config: TrainConfig) -> ZeroPlan:
    """What is divided: fsdp2 divides what ZeRO-3 divides."""
    return zero_plan("zero3" if config.fsdp else config.deepspeed or "zero0")


@dataclass(frozen=True)
class Cure:
    """Options that make a run fit, and its bytes then."""

    changes: dict[str, Any]
    bytes: int

    def __str__(self) -> str:
        return " ".join(f"{name}={_shown(value)}" for name, value in self.changes.items())


def find_cure(found: TrainingEstimate, base: Path, rows: Rows, device: Device) -> Cure | None:
    """The first of CURES, each on top of those before it, with which the run fits; None: nothing helps."""
    config, changes = found.config, dict[str, Any]()
    for cure in CURES:
        changed = _with(config, cure)
        if changed is None:
            continue
        config, changes = changed, changes | cure
        shorter = Rows(tuple(min(length, config.max_length) for length in rows.lengths))
        result = estimate_training(config, base, found.room, shorter, device, found.models)
        if result.fits or result.first_fit:
            rung = {} if result.fits or not result.first_fit else {"deepspeed": result.first_fit.name}
            size = result.bytes if result.fits or not result.first_fit else result.first_fit.device
            return Cure(changes | rung, size)
    return None


def _with(config: TrainConfig, cure: dict[str, Any]) -> TrainConfig | None:
    """None where the change is none, is not for this method, or goes the wrong way."""
    (name, value), *_ = cure.items()
    now, method = getattr(config, name), config.finetuning_type
    wrong = (
        now == value
        or (name == "max_length" and now <= value)
        or (name == "gradient_checkpointing" and method in PREFIX_METHODS)
        or (value == "lora" and method not in WHOLE_METHODS)
        or (value == "qlora" and (method != "lora" or config.from_scratch))
        or (value == "lora" and config.from_scratch)
    )
    if wrong:
        return None
    try:
        return replace(config, **cure)
    except ConfigError:
        return None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
