"""One run on several GPUs: what each rung of the ZeRO ladder leaves on a GPU and in main memory.

From fastest to leanest: 0 (plain data parallel), 1, 2, 2 with offload, 3, 3 with offload; "try left to right until it
runs". ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 3: with P numbers on N GPUs in mixed precision 2P + 2P
+ 12P bytes; stage 1 divides the 12, stage 2 a 2 as well, stage 3 all. Offload: arXiv:2101.06840.
"""

from dataclasses import dataclass

from trainer.estimate.training import Needs
from trainer.options.zero import ZERO_NAMES

BUCKET = 500_000_000  # reduce_bucket_size and allgather_bucket_size of trainer.options.zero, in numbers
LIVE = 1_000_000_000  # stage3_max_live_parameters
# DeepSpeed's own estimate (deepspeed.runtime.zero, estimate_zero*_model_states_mem_needs) allows for this in main
# memory: pinned buffers beside what is offloaded.
HOST_FACTOR = 1.5
SPEED = "0 (DDP) > 1 > 2 > 2 + offload > 3 > 3 + offload"


@dataclass(frozen=True)
class Rung:
    """`device` and `host` in bytes, of the fullest GPU and of the whole machine; `refused`: why it cannot be used."""

    name: str
    parts: dict[str, int]
    host: int = 0
    refused: str = ""

    @property
    def device(self) -> int:
        return sum(self.parts.values())

    @property
    def title(self) -> str:
        return {"zero0": "0 (DDP)", "zero2_offload": "2 + offload", "zero3_offload": "3 + offload"}.get(
            self.name, self.name.removeprefix("zero")
        )


def rungs(plain: Needs, divided: Needs, num_gpus: int) -> tuple[Rung, ...]:
    """All six, fastest first. On one GPU rung 0 is the plain run, without DeepSpeed; `divided` is counted with it."""
    return tuple(_rung(name, plain if name == "zero0" else divided, num_gpus) for name in ZERO_NAMES)


def _rung(name: str, needs: Needs, gpus: int) -> Rung:
    stage, offload = int(name[4]), name.endswith("offload")
    states = _plain(needs, gpus) if stage == 0 else _divided(needs, gpus, stage, offload)
    parts = {
        "weights": states["weights"],
        "adapter": needs.adapter,
        "other models": needs.others,
        "gradients": states["gradients"],
        "optimizer": states["optimizer"],
        "activations": needs.activations,
        "loss": needs.loss,
        "never together": -needs.swapped_with(states["gradients"]),
        "buffers": states["buffers"],
        "reserve": needs.reserve,
    }
    refused = ""
    if stage == 3 and needs.is_quantized:
        refused = "nf4 and int8 weights are stored as bytes, which ZeRO-3 does not divide"
    return Rung(name, parts, states["host"], refused)


def _plain(needs: Needs, gpus: int) -> dict[str, int]:
    """DDP has a copy of the gradients in its buckets."""
    return {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "buffers": needs.gradients if gpus > 1 else 0,
        "host": 0,
    }


def _divided(needs: Needs, gpus: int, stage: int, offload: bool) -> dict[str, int]:
    """DeepSpeed holds trained weights in the compute format, and float32 masters with the optimizer's states."""
    count, size = needs.num_trained, needs.compute
    weights = needs.frozen + (count * size if needs.trained else 0)
    gradients = count * size
    states = needs.optimizer + 4 * count
    buffers = 2 * min(BUCKET, count) * size
    host = 0
    if stage == 3:
        whole = weights
        weights, gradients, states = (-(-part // gpus) for part in (weights, gradients, states))
        buffers = min(LIVE * size, whole) if gpus > 1 or offload else 0
    else:
        states = -(-states // gpus)
        gradients = -(-gradients // gpus) if stage == 2 else gradients
    if offload:
        host = round(HOST_FACTOR * (states + gradients) * gpus)
        states = 0
        gradients = min(gradients, min(BUCKET, count) * size)
        if stage == 3:
            host += round(HOST_FACTOR * weights * gpus)
            weights = 0
    return {"weights": weights, "gradients": gradients, "optimizer": states, "buffers": buffers, "host": host}
