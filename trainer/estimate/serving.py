"""Bytes of a server: weights, KV cache for so many long conversations at once, adapters, working memory."""

from dataclasses import dataclass

from server.errors import ConfigError
from trainer.estimate import reserve
from trainer.estimate.shape import ModelShape
from trainer.estimate.weights import BYTES, weight_bytes

KV_BYTES = {**BYTES, "fp8": 1, "int8": 1}
PREFILL_TOKENS = 2048  # of one step: vLLM's max_num_batched_tokens for chunked prefill


@dataclass(frozen=True)
class Serving:
    """What is asked of a server. `number`: weights' format; `kv`: the cache's."""

    context: int
    concurrency: int
    number: str = "bf16"
    kv: str = ""
    adapters: int = 0
    rank: int = 16


@dataclass(frozen=True)
class ServingNeeds:
    """Bytes of all devices together. `per_token`: KV cache of one token."""

    parts: dict[str, int]
    per_token: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def kv_bytes_per_token(shape: ModelShape, kv: str) -> int:
    """2 (keys and values) * layers * KV heads * head size * bytes of a number; grouped-query attention
    (arXiv:2305.13245) has fewer KV heads than heads. Raises ConfigError."""
    if kv not in KV_BYTES:
        raise ConfigError(f"--kv-dtype {kv}: accepted are {', '.join(KV_BYTES)}")
    return 2 * shape.layers * shape.kv_width * KV_BYTES[kv]


def serving_needs(shape: ModelShape, asked: Serving, *, num_gpus: int) -> ServingNeeds:
    """Every sequence as long as `context`; 0 GPUs: on a CPU. Raises ConfigError for a context that the model does not
    have."""
    if shape.most_positions and asked.context > shape.most_positions:
        raise ConfigError(f"--context {asked.context}: this model has {shape.most_positions} positions")
    kept = asked.number if asked.number in BYTES else "bf16"
    kv = asked.kv or kept
    per_token = kv_bytes_per_token(shape, kv)
    adapter = shape.layers * asked.rank * sum(linear.inputs + linear.outputs for linear in shape.linears)
    parts = {
        "weights": weight_bytes(shape, asked.number, kept=kept),
        "KV cache": per_token * asked.context * asked.concurrency,
        "adapters": adapter * asked.adapters * BYTES[kept],
        "working memory": _working(shape, asked, BYTES[kept]),
        "reserve": reserve.CUDA_CONTEXT * num_gpus or reserve.CPU_PROCESS,
    }
    if num_gpus:
        parts["reserve"] += round(reserve.CUDA_FRAGMENTS * sum(parts.values()))
    return ServingNeeds(parts, per_token)


def _working(shape: ModelShape, asked: Serving, size: int) -> int:
    """One step: hidden states and the feed-forward part of a chunk of prompts, and float32 logits of every sequence."""
    tokens = min(PREFILL_TOKENS, asked.context * asked.concurrency)
    hidden = tokens * (4 * shape.hidden + 3 * shape.feed_forward) * size
    return hidden + 2 * asked.concurrency * shape.vocabulary * 4
