"""From a configuration to an answer: how much, does it fit, and what to change if it does not.

`estimate_training` is what `estimate` prints and what `train` asks before it loads anything.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.model_folder import read_model_config
from trainer.config import TrainConfig
from trainer.estimate.activations import Pass
from trainer.estimate.blank import blank_shape
from trainer.estimate.ladder import Rung, rungs
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows, largest_pass
from trainer.estimate.shape import ModelShape, shape_of
from trainer.estimate.training import Device, Needs, training_needs
from trainer.examples.base_facts import limits_of
from trainer.options.checks import PREFIX_METHODS, WHOLE_METHODS

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
    """`rungs` is empty on a CPU. `chosen`: the rung that the configuration names, or the plain run."""

    config: TrainConfig
    shape: ModelShape
    run: Pass
    needs: Needs
    room: Room
    rungs: tuple[Rung, ...]
    chosen: Rung | None
    knows_rows: bool

    @property
    def bytes(self) -> int:
        """Of one device at the peak; on a CPU of all processes together."""
        if self.chosen is None:
            return self.needs.peak * (self.config.num_processes or 1)
        return self.chosen.device

    @property
    def fits(self) -> bool:
        return self._fits(self.chosen) if self.chosen else self.bytes <= self.room.device

    @property
    def first_fit(self) -> Rung | None:
        """Left to right on the ladder."""
        return next((rung for rung in self.rungs if self._fits(rung)), None)

    def _fits(self, rung: Rung) -> bool:
        return not rung.refused and rung.device <= self.room.device and rung.host <= self.room.host


def read_shape(base: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Raises ConfigError."""
    config = read_model_config(base)
    found = shape_of(config)
    return found if found is not None else blank_shape(base, config, trust_remote_code=trust_remote_code)


def estimate_training(
    config: TrainConfig, base: Path, room: Room, rows: Rows, device: Device, shape: ModelShape | None = None
) -> TrainingEstimate:
    """Reads config.json and file sizes only. Raises ConfigError."""
    shape = shape or read_shape(base, trust_remote_code=config.trust_remote_code)
    run = largest_pass(
        config,
        rows,
        most=limits_of(config, base).max_length,
        num_ranks=max(1, room.num_gpus),
        on_cpu=room.on_cpu,
    )
    needs = training_needs(config, shape, base, run, device)
    ladder: tuple[Rung, ...] = ()
    if not room.on_cpu:
        divided = training_needs(config, shape, base, run, device, by_deepspeed=True)
        ladder = rungs(needs, divided, room.num_gpus)
    return TrainingEstimate(config, shape, run, needs, room, ladder, _chosen(config, ladder), bool(rows.lengths))


def _chosen(config: TrainConfig, ladder: tuple[Rung, ...]) -> Rung | None:
    """fsdp2 divides what ZeRO-3 divides. Another DeepSpeed file is taken as ZeRO-3 here."""
    if not ladder:
        return None
    wanted = "zero3" if config.fsdp else config.deepspeed or "zero0"
    return next((rung for rung in ladder if rung.name == wanted), ladder[-2])


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
        result = estimate_training(config, base, found.room, shorter, device, found.shape)
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
