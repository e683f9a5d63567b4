"""One linear map of the model, with adapters on it: every token of a batch gets its own adapter, or none.

LoRA: the A and B matrices of all adapters lie side by side, `A [R, in]` and `B [R, out]`, a column of the R for each
rank of each adapter. Every token goes through the columns of all adapters that the batch uses, and a mask leaves it its
own, so ranks may differ and a token without an adapter gets exactly +0. The mask fills in zeros rather than
multiplying: an adapter that overflows must not turn other tokens into NaN. IA3: a vector per adapter that scales the
input or the output; other tokens are multiplied by 1.

Knows nothing about files, requests or attention.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.engine.backends.base import AdapterError

Columns = tuple[tuple[int, int], ...]  # (owning slot, number of columns) of every LoRA, side by side
BASE = -1  # the slot of a token without an adapter
SMALL_OUTPUT = 2048
MAX_GAP = 64  # computing this many columns for nothing costs less than the three calls of another span


@dataclass(frozen=True)
class LoraMatrices:
    """One module's part of a LoRA: `a` is `[rank, in]`, `b` is `[out, rank]` with the scaling folded in."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Ia3Vector:
    """One module's part of an IA3: `scale` is `[in]` if it multiplies the input, else `[out]`."""

    is_input: bool
    scale: Tensor


@dataclass(frozen=True)
class Span:
    """Columns `start` to `end` of a projection; `others [T, end - start]` is True where a column is not the token's."""

    start: int
    end: int
    others: Tensor | None  # None: all columns are every token's own

    def own(self, hidden: Tensor) -> Tensor:
        """`[..., T, end - start]` with zeros where a column is not the token's, in place."""
        if self.others is not None:
            hidden.view(-1, *self.others.shape).masked_fill_(self.others, 0)
        return hidden


class SlotMap:
    """Which adapter slot each token of the current batch has; shared by all projections, which ask alike questions.

    `slots` is `[T]`, or None when the whole batch is for the base model.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self._list: Sequence[int] = []
        self._spans: dict[Columns, tuple[Span, ...]] = {}
        self._rows: dict[tuple[int, ...], Tensor | None] = {}

    def set(self, slots: Sequence[int], device: torch.device) -> None:
        """The slot of each token of the next forward pass. What is known of an equal batch is kept."""
        if self._list == slots:
            return
        self.clear()
        if any(slot != BASE for slot in slots):
            self._list = list(slots)
            self.slots = torch.tensor(self._list, device=device)

    def clear(self) -> None:
        """No batch: what its slots meant may change now."""
        self.slots = None
        self._list = []
        self._spans.clear()
        self._rows.clear()

    def spans(self, columns: Columns) -> tuple[Span, ...]:
        """Which of the columns this batch needs."""
        if columns not in self._spans:
            self._spans[columns] = tuple(self._cut(columns))
        return self._spans[columns]

    def rows(self, owners: tuple[int, ...]) -> Tensor | None:
        """Index `[T]`: 1 + the place of the token's slot in `owners`, 0 if absent. None if no token's slot is there."""
        if owners not in self._rows:
            places = {slot: place for place, slot in enumerate(owners, start=1)}
            rows = [places.get(slot, 0) for slot in self._list]
            assert self.slots is not None
            self._rows[owners] = self.slots.new_tensor(rows) if any(rows) else None
        return self._rows[owners]

    def _cut(self, columns: Columns) -> Iterator[Span]:
        present = {*self._list}
        owners = [slot for slot, count in columns for _ in range(count)]
        bounds: list[tuple[int, int]] = []
        end = 0
        for slot, count in columns:
            start, end = end, end + count
            if slot not in present:
                continue
            if bounds and start - bounds[-1][1] <= MAX_GAP:
                start = bounds.pop()[0]
            bounds.append((start, end))
        for start, end in bounds:
            yield Span(start, end, self._others(owners[start:end], present))

    def _others(self, owners: list[int], present: Set[int]) -> Tensor | None:
        if present == {*owners} and len(present) == 1:
            return None
        assert self.slots is not None
        return self.slots[:, None] != self.slots.new_tensor(owners)


class _Scales:
    """The IA3 vectors of one side of a projection: row 0 of `table` is all ones, row 1 + i belongs to `owners[i]`."""

    def __init__(self, ones: Tensor) -> None:
        self.owners: tuple[int, ...] = ()
        self.table = ones[None, :0]
        self._ones = ones

    def attach(self, slot: int, scale: Tensor) -> None:
        rows = [self.table] if self.owners else [self._ones[None]]
        self.table = torch.cat([*rows, scale[None]])
        self.owners += (slot,)

    def detach(self, slot: int) -> None:
        if slot not in self.owners:
            return
        kept = [0, *(place for place, owner in enumerate(self.owners, start=1) if owner != slot)]
        self.owners = tuple(owner for owner in self.owners if owner != slot)
        self.table = self.table[kept] if self.owners else self._ones[None, :0]


class Projection(nn.Module):
    """`base` plus whatever the loaded adapters add to it.

    `parts` names the modules of the model that `base` computes side by side and where each one's outputs lie: one
    module and all of the output, or query, key and value, or gate and up. `base` maps `[..., T, in]` to a new
    contiguous `[..., T, out]` that may be changed in place; both have `dtype`, as the adapters have.
    """

    def __init__(
        self,
        base: Callable[[Tensor], Tensor] | nn.Module,
        parts: Mapping[str, slice],
        in_features: int,
        slot_map: SlotMap,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base = base
        self.parts = dict(parts)
        self.out_features: int = max(part.stop for part in self.parts.values())
        self._slot_map = slot_map
        self._columns: Columns = ()
        # Parts of one width (gate and up) are computed as a batch of groups, so that B has no zeros to multiply.
        widths = {part.stop - part.start for part in self.parts.values()}
        self._groups = len(self.parts) if len(widths) == 1 else 1
        self._width = self.out_features // self._groups
        batch = () if self._groups == 1 else (self._groups,)
        # Small float32 products start faster on a CPU than bf16 ones; large ones are bound by memory.
        fast_dtype = torch.float32 if device.type == "cpu" else dtype
        self._a = torch.empty((*batch, 0, in_features), dtype=fast_dtype, device=device)
        b_dtype = fast_dtype if self._groups == 1 and self.out_features <= SMALL_OUTPUT else dtype
        self._b = torch.empty((*batch, 0, self._width), dtype=b_dtype, device=device)
        self._inputs = _Scales(torch.ones((), dtype=dtype, device=device).expand(in_features))
        self._outputs = _Scales(torch.ones((), dtype=dtype, device=device).expand(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., T, in]` -> `[..., T, out]`, where the slot map says whose each of the T tokens is."""
        if self._slot_map.slots is None:
            return self.base(x)
        if self._inputs.owners and (rows := self._slot_map.rows(self._inputs.owners)) is not None:
            x = x * self._inputs.table[rows]
        y: Tensor = self.base(x)
        if self._outputs.owners and (rows := self._slot_map.rows(self._outputs.owners)) is not None:
            y = y * self._outputs.table[rows]
        if self._columns:
            self._add_lora(x, y)
        return y

    def _add_lora(self, x: Tensor, y: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(self._a.dtype)
        for span in self._slot_map.spans(self._columns):
            count = span.end - span.start
            a, b = self._a.narrow(-2, span.start, count), self._b.narrow(-2, span.start, count)
            if self._groups == 1:
                hidden = span.own(torch.mm(x, a.t()))
                if b.dtype == y.dtype:
                    y.view(-1, self._width).addmm_(hidden.to(b.dtype), b)
                else:
                    y.view(-1, self._width).add_(torch.mm(hidden, b))
            else:
                hidden = span.own(torch.bmm(x.expand(self._groups, -1, -1), a.transpose(1, 2)))
                y.view(-1, self._groups, self._width).transpose(0, 1).baddbmm_(hidden.to(b.dtype), b)

    def attach_lora(self, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        """Add an adapter's matrices for some of the parts."""
        ranks = [matrix.a.shape[0] for matrix in matrices.values()]
        count = sum(ranks) if self._groups == 1 else max(ranks)
        a = self._a.new_zeros((self._groups, count, self._a.shape[-1]))
        b = self._b.new_zeros((self._groups, count, self._width))
        start = 0
        for (name, matrix), rank in zip(matrices.items(), ranks, strict=True):
            group, first = divmod(self.parts[name].start, self._width)
            a[group, start : start + rank] = matrix.a
            b[group, start : start + rank, first : first + matrix.b.shape[0]] = matrix.b.T
            start += rank if self._groups == 1 else 0
        if self._groups == 1:
            a, b = a[0], b[0]
        self._a, self._b = torch.cat([self._a, a], dim=-2), torch.cat([self._b, b], dim=-2)
        self._columns += ((slot, count),)

    def attach_ia3(self, slot: int, vectors: Mapping[str, Ia3Vector]) -> None:
        """Add an adapter's vectors for some of the parts. Raises AdapterError for an input that several parts share."""
        outputs: Tensor | None = None
        for name, vector in vectors.items():
            if not vector.is_input:
                outputs = self._outputs.table.new_ones(self.out_features) if outputs is None else outputs
                outputs[self.parts[name]] = vector.scale
            elif len(self.parts) == 1:
                self._inputs.attach(slot, vector.scale)
            else:
                raise AdapterError(
                    f"The IA3 adapter scales the input of {name}, which this forward computes together with other "
                    "modules. Start the engine with QLOOP_HF_FORWARD=generic to serve it."
                )
        if outputs is not None:
            self._outputs.attach(slot, outputs)

    def detach(self, slot: int) -> None:
        """Forget an adapter; one that is not here is fine. What is kept is copied, so the memory really goes."""
        self._slot_map.clear()  # its answers name the slot
        self._inputs.detach(slot)
        self._outputs.detach(slot)
        if all(owner != slot for owner, _ in self._columns):
            return
        owners = [owner for owner, count in self._columns for _ in range(count)]
        kept = torch.tensor(
            [i for i, owner in enumerate(owners) if owner != slot], device=self._a.device, dtype=torch.long
        )
        self._a, self._b = self._a.index_select(-2, kept), self._b.index_select(-2, kept)
        self._columns = tuple((owner, count) for owner, count in self._columns if owner != slot)
