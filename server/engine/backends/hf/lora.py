"""Several LoRA adapters and the base model in one batch.

In each adapted linear layer the A and B matrices of all loaded adapters lie side by side, `A [R, in]`, `B [out, R]`.
Every row of the batch goes through all of them, and a mask over R leaves it its own adapter's columns, so ranks may
differ and a base row gets exactly +0. The mask fills in zeros rather than multiplying: an adapter that overflows must
not turn other rows into NaN. Knows nothing about files or requests.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Matrices(Protocol):
    """One module's A `[rank, in]` and B `[out, rank]`, scaling included."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...


class RowSlots:
    """Which adapter slot each row of the current batch uses, shared by all layers. `slots` is None for base only."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def set(self, slots: list[int], device: torch.device) -> None:
        self._masks.clear()
        self.slots = torch.tensor(slots, device=device) if any(slot >= 0 for slot in slots) else None

    def others(self, owners: tuple[int, ...]) -> Tensor:
        """Bool `[B, 1, R]`: column r is not the row's own. Layers with the same owners share one mask."""
        assert self.slots is not None
        if owners not in self._masks:
            self._masks[owners] = self.slots[:, None, None] != torch.tensor(owners, device=self.slots.device)
        return self._masks[owners]


class LoraLinear(nn.Module):
    """A linear layer plus the low-rank updates of every loaded adapter that touches it."""

    def __init__(self, base: nn.Linear, rows: RowSlots) -> None:
        super().__init__()
        self.base = base
        self._rows = rows
        self._owners: tuple[int, ...] = ()  # the slot of each of the R columns
        self._a = base.weight.new_empty((0, base.in_features))
        self._b = base.weight.new_empty((base.out_features, 0))

    @property
    def is_empty(self) -> bool:
        return not self._owners

    def attach(self, slot: int, a: Tensor, b: Tensor) -> None:
        self._owners += (slot,) * a.shape[0]
        self._a, self._b = torch.cat([self._a, a]), torch.cat([self._b, b], dim=1)

    def detach(self, slot: int) -> None:
        kept = [column for column, owner in enumerate(self._owners) if owner != slot]
        self._owners = tuple(self._owners[column] for column in kept)
        self._a, self._b = self._a[kept], self._b[:, kept]

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[B, q, in]`."""
        y: Tensor = self.base(x)
        if self._rows.slots is None:
            return y
        hidden = nn.functional.linear(x, self._a).masked_fill(self._rows.others(self._owners), 0)
        return y + nn.functional.linear(hidden, self._b)


class LoraLayers:
    """The adapters loaded into one model. A layer is wrapped only while some adapter touches it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows = RowSlots()
        self._layers: dict[str, LoraLinear] = {}
        self.slots: dict[str, int] = {}  # adapter id -> slot

    def attach(self, adapter_id: str, matrices: Mapping[str, Matrices]) -> None:
        """Add an adapter; one that is already there stays as it is (a revision never changes)."""
        if adapter_id in self.slots:
            return
        slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots.values())
        for name, matrix in matrices.items():
            if name not in self._layers:
                linear = self._model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                self._layers[name] = LoraLinear(linear, self._rows)
                self._model.set_submodule(name, self._layers[name])
            self._layers[name].attach(slot, matrix.a, matrix.b)
        self.slots[adapter_id] = slot

    def detach(self, adapter_id: str) -> None:
        slot = self.slots.pop(adapter_id, None)
        if slot is None:
            return
        for name, layer in list(self._layers.items()):
            layer.detach(slot)
            if layer.is_empty:
                self._model.set_submodule(name, self._layers.pop(name).base)

    def set_rows(self, slots: list[int]) -> None:
        """The adapter slot of each row of the next forward pass; -1 is the base model."""
        self._rows.set(slots, next(self._model.parameters()).device)
