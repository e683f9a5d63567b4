"""One linear map of the model, with adapters on it: every token of a batch gets its own adapter, or none.

LoRA adds to the output (`lora.py`). IA3: a vector per adapter that scales the input or the output; other tokens are
multiplied by 1.

Knows nothing about files, requests or attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.lora import Lora, LoraMatrices, TorchLora
from server.engine.backends.hf.native import Kernels
from server.engine.backends.hf.native_lora import NativeLora
from server.engine.backends.hf.slots import SlotMap


@dataclass(frozen=True)
class Ia3Vector:
    """One module's part of an IA3: `scale` is `[in]` if it multiplies the input, else `[out]`."""

    is_input: bool
    scale: Tensor


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
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.parts = dict(parts)
        self.out_features: int = max(part.stop for part in self.parts.values())
        self._slot_map = slot_map
        self.lora: Lora
        if kernels is not None and NativeLora.suits(self.parts, in_features, dtype):
            self.lora = NativeLora(kernels, self.parts, in_features, slot_map)
        else:
            self.lora = TorchLora(self.parts, in_features, slot_map, dtype, device)
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
        if self.lora.columns:
            self.lora.add(x, y)
        return y

    def attach_lora(self, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        """Add an adapter's matrices for some of the parts."""
        self.lora.attach(slot, matrices)

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
        """Forget an adapter; one that is not here is fine."""
        self._slot_map.clear()  # its answers name the slot
        self._inputs.detach(slot)
        self._outputs.detach(slot)
        self.lora.detach(slot)
