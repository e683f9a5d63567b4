"""What a Llama-shaped layer computes between its linear maps: norms, rotary positions, gated SiLU.

One contract, two implementations: torch operations for any device and dtype, here, and compiled kernels that do each of
them in one pass over memory (`native.Kernels`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from server.engine.backends.hf.batch import Batch


@dataclass(frozen=True)
class Heads:
    """How `[T, (heads + 2 * kv_heads) * size]` splits into queries, keys and values, and how they are normed."""

    heads: int
    kv_heads: int
    size: int
    query_norm: Tensor | None  # [size]
    key_norm: Tensor | None
    epsilon: float


class Arithmetic(Protocol):
    def add_and_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add `delta` to `hidden` (`[T, size]`) in place; the RMSNorm of the sum."""

    def turn_and_store(
        self, projected: Tensor, heads: Heads, cos: Tensor, sin: Tensor, layer: int, batch: Batch
    ) -> Tensor:
        """Norm and turn queries and keys, store keys and values in the batch's cells; the queries `[T, heads, size]`.

        `cos` and `sin` are `[T, 1, size]`, the sines of the first half negated.
        """

    def silu_and_multiply(self, both: Tensor) -> Tensor:
        """`[T, 2 * size]`, gate and up side by side, -> silu(gate) * up."""


class TorchArithmetic:
    """Implements `Arithmetic`."""

    def add_and_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        if delta is not None:
            hidden += delta
        return rms_norm(hidden, weight.shape, weight, epsilon)

    def turn_and_store(
        self, projected: Tensor, heads: Heads, cos: Tensor, sin: Tensor, layer: int, batch: Batch
    ) -> Tensor:
        split = projected.view(len(projected), -1, heads.size)
        turned, values = torch.split(split, [heads.heads + heads.kv_heads, heads.kv_heads], dim=1)
        if heads.query_norm is not None and heads.key_norm is not None:
            queries, keys = torch.split(turned, [heads.heads, heads.kv_heads], dim=1)
            queries = rms_norm(queries, (heads.size,), heads.query_norm, heads.epsilon)
            turned = torch.cat([queries, rms_norm(keys, (heads.size,), heads.key_norm, heads.epsilon)], dim=1)
        turned = _rotate(turned, cos, sin)
        queries, keys = torch.split(turned, [heads.heads, heads.kv_heads], dim=1)
        batch.write(layer, keys, values)
        return queries

    def silu_and_multiply(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return silu(gate).mul_(up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864) on `[T, heads, head_dim]`."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
