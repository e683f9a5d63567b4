"""One run on several GPUs: what each rung of the ZeRO ladder leaves on a GPU and in main memory.

From fastest to leanest: 0 (plain data parallel), 1, 2, 2 with offload, 3, 3 with offload; "try left to right until it
runs". ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 3: with P numbers on N GPUs in mixed precision 2P + 2P
+ 12P bytes; stage 1 divides the 12, stage 2 a 2 as well, stage 3 all. Offload: arXiv:2101.06840.
"""

from dataclasses import dataclass

from trainer.estimate.training import Needs
from trainer.estimate.zero_plan import ZeroPlan, zero_plan
from trainer.options.zero import ZERO_NAMES

BUCKET = 500_000_000  # reduce_bucket_size and allgather_bucket_size of trainer.options.zero, in numbers
LIVE = 1_000_000_000  # stage3_max_live_parameters
# DeepSpeed's own estimate (deepspeed.runtime.zero, estimate_zero*_model_states_mem_needs) allows for this in main
# memory: pinned buffers beside what is offloaded.
HOST_FACTOR = 1.5
SPEED = "0 (DDP) > 1 > 2 > 2 + offload > 3 > 3 + offload"


@dataclass(frozen=True)
class Rung:
    """`device` and `host` in bytes, of the fullest GPU and of one machine; `refused`: why it cannot be used."""

    name: str
    parts: dict[str, int]
    host: int = 0
    refused: str = ""

    @property
    def device(self) -> int:
        return sum(self.parts.values())

    @property
    def title(self) -> str:
        return "0 (DDP)" if self.name == "zero0" else self.name.removeprefix("zero").replace("_", " + ")


def rungs(plain: Needs, divided: Needs, num_gpus: int, num_machines: int = 1) -> tuple[Rung, ...]:
    """All six, fastest first. On one GPU rung 0 is the plain run, without DeepSpeed; `divided` is counted with it."""
    return tuple(rung_of(zero_plan(name), plain, divided, num_gpus, num_machines) for name in ZERO_NAMES)


def rung_of(plan: ZeroPlan, plain: Needs, divided: Needs, num_gpus: int, num_machines: int = 1) -> Rung:
    """What a plan leaves; what it moves to NVMe is counted as main memory. `num_gpus`: of all machines together."""
    needs = divided if plan.stage else plain
    states = _divided(needs, num_gpus, num_machines, plan) if plan.stage else _plain(needs, num_gpus)
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
    if plan.stage == 3 and needs.is_quantized:
        refused = "nf4 and int8 weights are stored as bytes, which ZeRO-3 does not divide"
    return Rung(plan.name, parts, states["host"], refused)


def _plain(needs: Needs, gpus: int) -> dict[str, int]:
    """DDP has a copy of the gradients in its buckets."""
    return {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "buffers": needs.gradients if gpus > 1 else 0,
        "host": 0,
    }


def _divided(needs: Needs, gpus: int, machines: int, plan: ZeroPlan) -> dict[str, int]:
    """DeepSpeed holds trained weights in the compute format, and float32 masters with the optimizer's states."""
    count, size = needs.num_trained, needs.compute
    weights = needs.frozen + (count * size if needs.trained else 0)
    states, own = -(-(needs.optimizer + 4 * count) // gpus), -(-count * size // gpus)
    gradients = own if plan.stage >= 2 else count * size
    buffers = 2 * min(BUCKET, count) * size
    if plan.stage == 3:
        buffers = min(LIVE * size, weights) if gpus > 1 or plan.offloads else 0
        weights = -(-weights // gpus)
    moved = 0
    if plan.states != "none":
        moved += states + own
        states = 0
        gradients = min(gradients, min(BUCKET, count) * size) if plan.stage >= 2 else gradients
    if plan.weights != "none":
        moved += weights
        weights = 0
    # Main memory is one machine's, and only that machine's GPUs move to it.
    host = round(HOST_FACTOR * moved * -(-gpus // machines))
    return {"weights": weights, "gradients": gradients, "optimizer": states, "buffers": buffers, "host": host}
