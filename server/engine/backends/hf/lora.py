"""LoRA (https://arxiv.org/abs/2106.09685) of many adapters on one linear map: y += B A x, for every token with its own
adapter's A and B.

The matrices of all adapters lie side by side, `A [R, in]` and `B [R, out]`, a column of the R for each rank of each
adapter. Every token goes through the columns of all adapters that the batch uses, and a mask leaves it its own, so
ranks may differ and a token without an adapter gets exactly +0. The mask fills in zeros rather than multiplying: an
adapter that overflows must not turn other tokens into NaN.

One contract, two implementations: torch operations for any device and dtype, here, and compiled kernels
(`native_lora.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.backends.hf.slots import Columns, SlotMap

SMALL_OUTPUT = 2048


@dataclass(frozen=True)
class LoraMatrices:
    """One module's part of a LoRA: `a` is `[rank, in]`, `b` is `[out, rank]` with the scaling folded in."""

    a: Tensor
    b: Tensor


class Lora(Protocol):
    """`columns` says whose columns `a` and `b` hold, in an order of the implementation's own."""

    columns: Columns
    a: Tensor
    b: Tensor

    def attach(self, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        """Add an adapter's matrices for some of the parts."""

    def detach(self, slot: int) -> None:
        """Forget an adapter; one that is not here is fine. What is kept is copied, so the memory really goes."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to `y` (`[..., T, out]`, contiguous) what the tokens' adapters make of `x` (`[..., T, in]`)."""


class TorchLora:
    """Implements `Lora`. `parts`: which outputs are which module's."""

    def __init__(
        self,
        parts: Mapping[str, slice],
        in_features: int,
        slot_map: SlotMap,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.columns: Columns = ()
        self._parts = parts
        self._slot_map = slot_map
        # Parts of one width (gate and up) are computed as a batch of groups, so that B has no zeros to multiply.
        widths = {part.stop - part.start for part in parts.values()}
        out_features = max(part.stop for part in parts.values())
        self._groups = len(parts) if len(widths) == 1 else 1
        self._width = out_features // self._groups
        batch = () if self._groups == 1 else (self._groups,)
        # Small float32 products start faster on a CPU than bf16 ones; large ones are bound by memory.
        fast_dtype = torch.float32 if device.type == "cpu" else dtype
        self.a = torch.empty((*batch, 0, in_features), dtype=fast_dtype, device=device)
        b_dtype = fast_dtype if self._groups == 1 and out_features <= SMALL_OUTPUT else dtype
        self.b = torch.empty((*batch, 0, self._width), dtype=b_dtype, device=device)

    def attach(self, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        ranks = [matrix.a.shape[0] for matrix in matrices.values()]
        count = sum(ranks) if self._groups == 1 else max(ranks)
        a = self.a.new_zeros((self._groups, count, self.a.shape[-1]))
        b = self.b.new_zeros((self._groups, count, self._width))
        start = 0
        for (name, matrix), rank in zip(matrices.items(), ranks, strict=True):
            group, first = divmod(self._parts[name].start, self._width)
            a[group, start : start + rank] = matrix.a
            b[group, start : start + rank, first : first + matrix.b.shape[0]] = matrix.b.T
            start += rank if self._groups == 1 else 0
        if self._groups == 1:
            a, b = a[0], b[0]
        self.a, self.b = torch.cat([self.a, a], dim=-2), torch.cat([self.b, b], dim=-2)
        self.columns += ((slot, count),)

    def detach(self, slot: int) -> None:
        if all(owner != slot for owner, _ in self.columns):
            return
        kept = kept_columns(self.columns, slot).to(self.a.device)
        self.a, self.b = self.a.index_select(-2, kept), self.b.index_select(-2, kept)
        self.columns = tuple((owner, count) for owner, count in self.columns if owner != slot)

    def add(self, x: Tensor, y: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(self.a.dtype)
        for span in self._slot_map.spans(self.columns):
            count = span.end - span.start
            a, b = self.a.narrow(-2, span.start, count), self.b.narrow(-2, span.start, count)
            if self._groups == 1:
                hidden = span.own(torch.mm(x, a.t()))
                if b.dtype == y.dtype:
                    y.view(-1, self._width).addmm_(hidden.to(b.dtype), b)
                else:
                    y.view(-1, self._width).add_(torch.mm(hidden, b))
            else:
                hidden = span.own(torch.bmm(x.expand(self._groups, -1, -1), a.transpose(1, 2)))
                y.view(-1, self._groups, self._width).transpose(0, 1).baddbmm_(hidden.to(b.dtype), b)


def kept_columns(columns: Columns, slot: int) -> Tensor:
    """Index of the columns that stay when the adapter in `slot` goes."""
    owners = [owner for owner, count in columns for _ in range(count)]
    return torch.tensor([i for i, owner in enumerate(owners) if owner != slot], dtype=torch.long)
