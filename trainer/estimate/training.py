"""Bytes of a training run, part by part, on one device and with everything on it; `ladder` divides them over several.

Counts what this trainer does: whole weights and every trained number in float32 with float32 gradients and AdamW states
(no second master copy; autocast casts), frozen ones in the load format, adapters in float32 (PEFT's own rule).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from server.store.model_folder import saved_format
from trainer.config import TrainConfig
from trainer.estimate import reserve
from trainer.estimate.activations import (
    Numbers,
    Pass,
    backward_peak,
    cast_weights,
    saved_by_checkpoint,
    saved_by_layer,
    saved_outside,
)
from trainer.estimate.models import RewardModel
from trainer.estimate.output_loss import LossBytes, loss_bytes, pair_loss_bytes, ppo_loss_bytes
from trainer.estimate.shape import ModelShape
from trainer.estimate.trained import Trained, trained_by
from trainer.estimate.weights import BYTES, SAVED_FORMATS, SHORT_NAMES, file_bytes, weight_bytes
from trainer.methods.plan import base_bits, changes_base
from trainer.options.checks import TRL_STAGES, WHOLE_METHODS
from trainer.options.precision import base_format, checkpoints, reward_format, uses_bf16

STATE_BYTES = {"adamw": 8.0, "8bit": 2.0 + 8 / 256, "adafactor": 0.02, "sgd": 0.0, "lion": 4.0, "ada": 4.0, "rms": 4.0}


@dataclass(frozen=True)
class Needs:
    """Bytes with nothing divided. `frozen` and `trained`: weights. `rest`: beside all gradients when the backward
    pass ends. `accumulates`: gradients of an earlier pass stand beside the activations of the next. `loading`: what the
    file takes beside the weights while it is read, `mapped` of it as pages of the file."""

    frozen: int
    trained: int
    num_trained: int
    adapter: int
    others: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    rest: int
    whole_logits: int
    reserve: int
    loading: int
    is_quantized: bool = False
    compute: int = 4
    chunk_logits: int = 0
    accumulates: bool = False
    process: int = 0  # of `reserve`, what is there before the first step
    mapped: int = 0

    @property
    def weights(self) -> int:
        return self.frozen + self.trained

    @property
    def swapped(self) -> int:
        return self.swapped_with(self.gradients)

    def swapped_with(self, gradients: int) -> int:
        """What of the gradients, activations and loss is never there together with the others."""
        forward = self.activations + self.loss
        peak = max(forward + (gradients if self.accumulates else 0), gradients + self.rest)
        return forward + gradients - peak

    @property
    def step(self) -> int:
        return (
            self.weights
            + self.adapter
            + self.others
            + self.gradients
            + self.optimizer
            + self.activations
            + self.loss
            - self.swapped
            + self.reserve
        )

    @property
    def load(self) -> int:
        return self.weights + self.others + self.loading + (self.process or self.reserve)

    @property
    def peak(self) -> int:
        return max(self.step, self.load)

    @property
    def least_peak(self) -> int:
        """Without the file's pages: they show in the process' size, but the kernel drops them when memory is short."""
        return max(self.step, self.load - self.mapped)


@dataclass(frozen=True)
class Device:
    """What the run computes on, as far as memory is concerned. `process`: bytes that this process already has."""

    on_cpu: bool = True
    has_bf16: bool = False
    process: int = reserve.CPU_PROCESS


def numbers_of(config: TrainConfig, device: Device) -> Numbers:
    """Formats as the trainer chooses them: fp32 masters for whole methods, 16 bits below adapters."""
    base = SHORT_NAMES[base_format(config, gpu_has_bf16=device.has_bf16)]
    mixed = config.fp16 or uses_bf16(config, gpu_has_bf16=device.has_bf16)
    return Numbers(BYTES[base], 2 if mixed else 4, mixed, device.on_cpu)


def load_format(config: TrainConfig, shape: ModelShape, device: Device) -> tuple[str, str]:
    """The weights' format, and that of what is not quantized. Weights that are saved quantized are loaded so."""
    kept = SHORT_NAMES[base_format(config, gpu_has_bf16=device.has_bf16)]
    return SAVED_FORMATS.get(shape.saved_bits or base_bits(config), kept), kept


def training_needs(
    config: TrainConfig,
    shape: ModelShape,
    folder: Path,
    run: Pass,
    device: Device,
    *,
    reward: RewardModel | None = None,
    by_deepspeed: bool = False,
) -> Needs:
    """Everything on one device. `by_deepspeed`: trained weights are in the compute format when they are used.

    `reward`: of stage ppo; not known, it is counted like the base. Raises ConfigError where the method does not suit
    the architecture.
    """
    trained = trained_by(config, shape, folder)
    numbers = numbers_of(config, device)
    if by_deepspeed:
        numbers = replace(numbers, base=numbers.compute)
    number, kept = load_format(config, shape, device)
    needs = Needs(
        **_states(config, trained, weight_bytes(shape, number, kept=kept)),
        **_passing(config, shape, trained, run, numbers),
        **_reading(config, shape, folder, number, device),
        others=_other_models(config, shape, reward or RewardModel(shape), device),
        reserve=0,
        is_quantized=number in SAVED_FORMATS.values(),
        compute=numbers.compute,
        accumulates=config.gradient_accumulation_steps > 1,
    )
    return with_reserve(needs, config, device)


def with_reserve(needs: Needs, config: TrainConfig, device: Device) -> Needs:
    if device.on_cpu:
        later = reserve.CPU_LATER + (reserve.CPU_TRL if config.stage in TRL_STAGES else 0)
        return replace(needs, reserve=device.process + later, process=device.process)
    return replace(needs, reserve=reserve.CUDA_CONTEXT + round(reserve.CUDA_FRAGMENTS * needs.step))


def state_bytes(optimizer: str) -> float:
    """Optimizer state per trained number: AdamW two float32 (arXiv:1711.05101), 8-bit AdamW two bytes and two float32
    constants per block of 256 (arXiv:2110.02861), Adafactor rows and columns only (arXiv:1804.04235)."""
    if "8bit" in optimizer:
        return STATE_BYTES["8bit"]
    return next((size for name, size in STATE_BYTES.items() if optimizer.startswith(name)), STATE_BYTES["adamw"])


def _states(config: TrainConfig, trained: Trained, weights: int) -> dict[str, int]:
    """Weights, and what every trained number has."""
    size = trained.num * 4
    is_whole = config.finetuning_type in WHOLE_METHODS
    copies = 2 if config.stage == "dpo" or changes_base(config) else 1
    return {
        "frozen": weights - (size if is_whole else 0),
        "trained": size if is_whole else 0,
        "num_trained": trained.num,
        "adapter": 0 if is_whole else size * copies,
        "gradients": size,
        "optimizer": round(trained.num * state_bytes(config.optim)),
    }


def _passing(config: TrainConfig, shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers) -> dict[str, int]:
    """What a forward pass and its backward pass take."""
    activations, one_layer = _activations(config, shape, trained, run, numbers)
    loss = _loss(config, shape, trained, run, numbers)
    # The tied embedding's gradient comes twice, from the output layer and from the input, and is added.
    twice = shape.num_embedding * 4 if trained.trains_head and shape.is_tied else 0
    return {
        "activations": activations,
        "loss": loss.kept + max(loss.passing, backward_peak(shape, trained, run, numbers)),
        "rest": one_layer + twice,
        "whole_logits": loss.whole,
        "chunk_logits": loss.logits,
    }


def _reading(config: TrainConfig, shape: ModelShape, folder: Path, number: str, device: Device) -> dict[str, int]:
    """safetensors maps the file; pages that were read count until it is closed, and so does the tensor that is being
    converted, at most the embeddings. Read in its own format, the mapping is the weights."""
    if not device.on_cpu or config.from_scratch or (number in BYTES and number == _saved_format(folder)):
        return {"loading": 0, "mapped": 0}
    size = file_bytes(folder) or weight_bytes(shape, _saved_format(folder))  # a hub's model before its download
    return {"loading": size + round(size * shape.num_embedding / shape.num_parameters), "mapped": size}


def _activations(
    config: TrainConfig, shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers
) -> tuple[int, int]:
    """At the end of the forward pass; and what is still there at the end of the backward pass."""
    dropout = bool(trained.lora) and config.lora_dropout > 0
    layer = saved_by_layer(shape, trained, run, numbers, dropout=dropout)
    casts = cast_weights(shape, trained, numbers)
    outside = saved_outside(shape, run, numbers)
    if not checkpoints(config, on_gpu=not numbers.on_cpu):
        return trained.layers * layer + casts + outside, 0
    kept = trained.layers * saved_by_checkpoint(shape, run, numbers)
    working = layer + backward_peak(shape, trained, run, numbers)
    return kept + casts + outside + layer, kept + working


def _loss(config: TrainConfig, shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers) -> LossBytes:
    if config.stage == "ppo":
        return ppo_loss_bytes(shape, run, numbers, config.ppo_max_new_tokens)
    if config.stage in TRL_STAGES:
        return pair_loss_bytes(shape, trained, run, numbers, is_reward=config.stage == "rm")
    return loss_bytes(shape, trained, run, numbers)


def _other_models(config: TrainConfig, shape: ModelShape, reward: RewardModel, device: Device) -> int:
    """dpo and ppo keep a second copy of whole weights as reference; ppo a reward model."""
    is_whole = config.finetuning_type in WHOLE_METHODS
    copy = weight_bytes(shape, "fp32") if is_whole and config.stage in ("dpo", "ppo") else 0
    if config.stage != "ppo":
        return copy
    return copy + reward.bytes_in(SHORT_NAMES[reward_format(config, gpu_has_bf16=device.has_bf16)])


def _saved_format(folder: Path) -> str:
    """Of the folder's weights, as config.json names it; empty where it is none of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return SHORT_NAMES.get(saved_format(config), "")
