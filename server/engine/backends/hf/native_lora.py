"""LoRA with compiled kernels: masked like `TorchLora`, in one call, on the matrix tiles.

Columns come in blocks of 32, and a block is packed like a linear map's weight. A block serves every part of the
projection at once: its A has the part's own 32 columns for each of them, and as parts have different outputs, all parts
fit into one B that has no zeros to multiply. Blocks without columns of the batch's adapters are not read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.engine.backends.hf.lora import LoraMatrices, kept_columns
from server.engine.backends.hf.native import Kernels, LoraCall
from server.engine.backends.hf.slots import BLOCK, Blocks, Columns, SlotMap


class NativeLora:
    """Implements `Lora` for bf16. `parts`: which outputs are which module's, ascending."""

    def __init__(self, kernels: Kernels, parts: Mapping[str, slice], in_features: int, slot_map: SlotMap) -> None:
        self.columns: Columns = ()
        self._kernels = kernels
        self._parts = parts
        self._slot_map = slot_map
        self._inputs, self._outputs = in_features, max(part.stop for part in parts.values())
        self._ends = torch.tensor([part.stop for part in parts.values()], dtype=torch.int32)
        self.a = _pack_a(torch.empty(0, len(parts), in_features, dtype=torch.bfloat16))
        self.b = _pack_b(torch.empty(0, self._outputs, dtype=torch.bfloat16))
        # A step calls nearly a hundred of these, and most are alike: only what has changed is filled in.
        self._call = LoraCall(ends=self._ends.data_ptr(), parts=len(parts), inputs=in_features, outputs=self._outputs)
        self._blocks: Blocks | None = None  # what the call names now

    @staticmethod
    def suits(parts: Mapping[str, slice], in_features: int, dtype: torch.dtype) -> bool:
        sizes = [in_features, *(part.stop for part in parts.values())]
        return dtype == torch.bfloat16 and all(size % BLOCK == 0 for size in sizes)

    def attach(self, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        count = max(len(matrix.a) for matrix in matrices.values())
        a = self.a.new_zeros(count, len(self._parts), self._inputs)
        b = self.b.new_zeros(count, self._outputs)
        for place, (name, part) in enumerate(self._parts.items()):
            if name in matrices:
                rank = len(matrices[name].a)
                a[:rank, place] = matrices[name].a
                b[:rank, part] = matrices[name].b.T
        full, rest = divmod(sum(count for _, count in self.columns), BLOCK)
        a = torch.cat([_unpack_a(self.a[full:])[:rest], a])
        b = torch.cat([_unpack_b(self.b[full:])[:rest], b])
        self._put(full, a, b)
        self.columns += ((slot, count),)

    def detach(self, slot: int) -> None:
        if all(owner != slot for owner, _ in self.columns):
            return
        kept = kept_columns(self.columns, slot)
        self._put(0, _unpack_a(self.a)[kept], _unpack_b(self.b)[kept])
        self.columns = tuple((owner, count) for owner, count in self.columns if owner != slot)

    def add(self, x: Tensor, y: Tensor) -> None:
        blocks = self._slot_map.blocks(self.columns)
        if blocks is not self._blocks:
            self._take(blocks)
        if self._call.num_live:
            x = x.contiguous()
            self._call.x, self._call.y = x.data_ptr(), y.data_ptr()
            self._kernels.add_lora(self._call)

    def _take(self, blocks: Blocks) -> None:
        call, self._blocks = self._call, blocks
        call.tokens, call.num_live = len(blocks.own), len(blocks.live)
        call.own, call.live = blocks.own.data_ptr(), blocks.live.data_ptr()

    def _put(self, full: int, a: Tensor, b: Tensor) -> None:
        """Keep the first `full` blocks, then put these columns."""
        self.a, self.b = torch.cat([self.a[:full], _pack_a(a)]), torch.cat([self.b[:full], _pack_b(b)])
        self._call.a, self._call.b = self.a.data_ptr(), self.b.data_ptr()


def _pack_a(a: Tensor) -> Tensor:
    """`[columns, parts, in]` -> `[blocks, parts, 2, in / 32, 16, 16, 2]`, filled up with zeros."""
    a = pad(a, (0, 0, 0, 0, 0, -len(a) % BLOCK))
    split = a.view(len(a) // BLOCK, 2, 16, a.shape[1], a.shape[2] // 32, 16, 2)
    return split.permute(0, 3, 1, 4, 5, 2, 6).contiguous()


def _unpack_a(packed: Tensor) -> Tensor:
    blocks, parts, _, lines = packed.shape[:4]
    return packed.permute(0, 2, 5, 1, 3, 4, 6).reshape(blocks * BLOCK, parts, lines * 32)


def _pack_b(b: Tensor) -> Tensor:
    """`[columns, out]` -> `[blocks, out / 32, 2, 16, 16, 2]`, filled up with zeros."""
    b = pad(b, (0, 0, 0, -len(b) % BLOCK))
    split = b.view(len(b) // BLOCK, 16, 2, b.shape[1] // 32, 2, 16)
    return split.permute(0, 3, 4, 1, 5, 2).contiguous()


def _unpack_b(packed: Tensor) -> Tensor:
    blocks, lines = packed.shape[:2]
    return packed.permute(0, 3, 5, 1, 2, 4).reshape(blocks * BLOCK, lines * 32)
