"""The adapters loaded into one model: which slot each has, on which projections it acts, which cells it puts first.

Knows nothing about folders or requests.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_files import AdapterWeights
from server.engine.backends.hf.projection import Projection

Weights = TypeVar("Weights")


class LoadedAdapters:
    """Attach and detach between forward passes; nothing here is safe to call during one.

    `projections` says for every module that takes adapters which projection computes it; several names may share one.
    """

    def __init__(self, projections: Mapping[str, Projection]) -> None:
        self._projections = projections
        self._cells: dict[int, Tensor] = {}
        self.slots: dict[str, int] = {}  # adapter id -> slot; the smallest free number is used again

    def attach(self, adapter_id: str, weights: AdapterWeights) -> None:
        """Add an adapter; one that is already there stays as it is (a revision never changes).

        Prompt embeddings must have been turned into cells (`with_cells`). Raises AdapterError if the network cannot
        apply it; after that or any other error everything is as before.
        """
        assert weights.embeddings is None
        if adapter_id in self.slots:
            return
        slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots.values())
        try:
            for projection, matrices in self._by_projection(weights.lora).items():
                projection.attach_lora(slot, matrices)
            for projection, vectors in self._by_projection(weights.ia3).items():
                projection.attach_ia3(slot, vectors)
        except BaseException:
            self._detach(slot)
            raise
        if weights.cells is not None:
            self._cells[slot] = weights.cells
        self.slots[adapter_id] = slot

    def detach(self, adapter_id: str) -> None:
        """Drop an adapter's tensors; an unknown id is fine."""
        slot = self.slots.pop(adapter_id, None)
        if slot is not None:
            self._detach(slot)

    def cells(self, slot: int) -> Tensor | None:
        """KV cells that stand before the first token, `[layers, 2, num_virtual, kv_heads, head_dim]`, if any."""
        return self._cells.get(slot)

    def num_virtual(self, slot: int) -> int:
        """How many cells an adapter puts before the first token; 0 for -1 and for most."""
        return self._cells[slot].shape[2] if slot in self._cells else 0

    def _detach(self, slot: int) -> None:
        self._cells.pop(slot, None)
        for projection in set(self._projections.values()):
            projection.detach(slot)

    def _by_projection(self, weights: Mapping[str, Weights]) -> dict[Projection, dict[str, Weights]]:
        grouped: dict[Projection, dict[str, Weights]] = {}
        for name, weight in weights.items():
            if name not in self._projections:
                raise AdapterError(f"{name} takes no adapter in this engine. Merge the adapter into the base model.")
            grouped.setdefault(self._projections[name], {})[name] = weight
        return grouped
