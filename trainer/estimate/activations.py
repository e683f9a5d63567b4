"""What a forward pass keeps for the backward pass, layer by layer, as torch's autograd keeps it.

The counts are those of transformers' Qwen2 and Llama code with sdpa attention, tensor by tensor; tests compare them
with what autograd really saves. The method of counting: Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
"""

from dataclasses import dataclass

from trainer.estimate.shape import Linear, ModelShape
from trainer.estimate.trained import Trained


@dataclass(frozen=True)
class Pass:
    """One forward pass: `rows` x `width` tokens. `is_packed`: it has a mask of its own, which sdpa keeps per layer."""

    rows: int
    width: int
    is_packed: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Numbers:
    """Bytes per number: `base` of the weights, `compute` of matrix products, `is_mixed` when autocast is on.

    `mask`: of a dropout mask: 1 on a GPU; a CPU keeps a number of the dropped tensor's own format.
    """

    base: int = 4
    compute: int = 4
    is_mixed: bool = False
    on_cpu: bool = True


def saved_by_layer(shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers, *, dropout: bool = False) -> int:
    """Bytes that one decoder layer keeps until its backward pass."""
    attention = _attention(shape, run, numbers)
    norms = 2 * _norm(shape, trained, numbers)
    return attention + run.tokens * (norms + _feed_forward(shape, numbers) + _inputs(shape, trained, numbers, dropout))


def saved_by_checkpoint(shape: ModelShape, run: Pass, numbers: Numbers) -> int:
    """Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) keeps the input of each layer only."""
    return run.tokens * shape.hidden * numbers.base


def saved_outside(shape: ModelShape, run: Pass, numbers: Numbers) -> int:
    """The last norm's input, token ids, and the cosines and sines of the positions."""
    return run.tokens * (2 * shape.hidden * 4 + 8 + 2 * shape.head_size * numbers.base)


def cast_weights(shape: ModelShape, trained: Trained, numbers: Numbers) -> int:
    """Autocast keeps a copy of each float32 matrix in 16 bits until the forward pass ends or its gradient is made."""
    if not numbers.is_mixed:
        return 0
    adapter = sum(linear.inputs + linear.outputs for linear in trained.lora) * trained.rank * trained.layers
    frozen = shape.num_linear_weights if numbers.base > numbers.compute else 0
    return (adapter + frozen) * numbers.compute


def backward_peak(shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers) -> int:
    """Gradients in flight while a layer's feed-forward part is differentiated: three of its width, two of hidden."""
    return run.tokens * (3 * shape.feed_forward + 2 * shape.hidden) * numbers.compute


def _norm(shape: ModelShape, trained: Trained, numbers: Numbers) -> int:
    """RMSNorm: its input in float32, one factor per token, and the scaled input where its weight is trained."""
    scaled = shape.hidden * numbers.base if trained.trains_base else 0
    return shape.hidden * 4 + 4 + scaled


def _attention(shape: ModelShape, run: Pass, numbers: Numbers) -> int:
    """sdpa: queries, keys and values after rotation, the result, a float32 per head and token, and the mask.

    With a mask keys and values are repeated for every query head. FlashAttention (arXiv:2205.14135) keeps no scores.
    """
    keys = shape.query_width if run.is_packed else shape.kv_width
    kept = (2 * shape.query_width + 2 * keys) * numbers.compute + 4 * shape.heads
    mask = run.rows * run.width * run.width * numbers.compute if run.is_packed else 0
    return run.tokens * kept + mask


def _feed_forward(shape: ModelShape, numbers: Numbers) -> int:
    """SwiGLU: gate, its SiLU, and up; the product is the input of the last matrix and counted there."""
    return 3 * shape.feed_forward * numbers.compute


def _inputs(shape: ModelShape, trained: Trained, numbers: Numbers, dropout: bool) -> int:
    """Inputs of the linear layers, kept where a weight on them is trained."""
    if trained.trains_base:
        return sum(_whole_input(shape, linear, numbers) for linear in shape.linears) - _shared(shape, numbers)
    return sum(_lora_input(linear, trained.rank, numbers, dropout) for linear in trained.lora) - (
        0 if dropout or numbers.is_mixed else _shared_lora(shape, trained, numbers)
    )


def _whole_input(shape: ModelShape, linear: Linear, numbers: Numbers) -> int:
    if linear.inputs == shape.query_width and linear.name.endswith("o_proj"):
        return 0  # it is the attention's result
    return linear.inputs * numbers.compute


def _shared(shape: ModelShape, numbers: Numbers) -> int:
    """Without autocast q, k and v read one tensor, and so do gate and up; autocast casts it for each."""
    return 0 if numbers.is_mixed else 3 * shape.hidden * numbers.compute


def _lora_input(linear: Linear, rank: int, numbers: Numbers, dropout: bool) -> int:
    """LoRA's A reads the input in its own format, after dropout; B reads A's result."""
    read = linear.inputs * numbers.compute + rank * numbers.compute
    mask = linear.inputs * (4 if numbers.on_cpu else 1) if dropout else 0
    return read + mask


def _shared_lora(shape: ModelShape, trained: Trained, numbers: Numbers) -> int:
    """Without dropout the same tensors are read by several, and o's input is the attention's result."""
    ends = [linear.name.rpartition(".")[2] for linear in trained.lora]
    twice = max(0, sum(end in ("q_proj", "k_proj", "v_proj") for end in ends) - 1)
    twice += max(0, sum(end in ("gate_proj", "up_proj") for end in ends) - 1)
    kept = shape.query_width if "o_proj" in ends else 0
    return (twice * shape.hidden + kept) * numbers.compute
