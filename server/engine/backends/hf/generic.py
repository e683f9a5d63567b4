"""Any decoder of transformers through its own code: only attention is ours.

The model is called with the whole batch as one row of `T` tokens and never sees a cache or a mask: transformers lets an
attention function be registered by name, and ours stores keys and values and knows which token belongs to whom.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from server.engine.backends.hf.adapter_files import ModelShape
from server.engine.backends.hf.batch import Batch
from server.engine.backends.hf.kv_store import KvShape
from server.engine.backends.hf.projection import Projection
from server.engine.backends.hf.slots import SlotMap

ATTENTION = "qloop"  # no mask function has this name, so transformers builds no mask


class GenericNetwork:
    """Implements `Network`."""

    def __init__(self, model: PreTrainedModel, shape: KvShape, modules: ModelShape) -> None:
        self.shape = shape
        self._slots = SlotMap()
        self._wanted_slots = SlotMap()  # the head only sees the tokens whose logits are wanted
        self._model = model
        self._batch: Batch | None = None
        self.projections: dict[str, Projection] = {name: self._wrap(name, modules) for name in modules.modules}
        for name, projection in self.projections.items():
            model.set_submodule(name, projection)
        AttentionInterface.register(ATTENTION, _attend)
        model.config._attn_implementation = ATTENTION
        for module in model.modules():
            # One interpreter may hold several networks: each attention module knows its own.
            module.__dict__["qloop_network"] = self
            if type(module).__name__ == "BloomAttention":
                module.__dict__["qloop_slopes"] = _slopes(model.config.num_attention_heads, shape.device)
                module.forward = MethodType(_bloom_attention, module)

    def _wrap(self, name: str, modules: ModelShape) -> Projection:
        inner = self._model.get_submodule(name)
        num_in, num_out = modules.modules[name]
        is_head = inner is self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        slots = self._wanted_slots if is_head else self._slots
        return Projection(inner, {name: slice(0, num_out)}, num_in, slots, modules.dtype, modules.device)

    def forward(self, batch: Batch) -> Tensor:
        return self._call(batch, input_ids=batch.token_ids[None])

    def embed_virtual(self, embeddings: Tensor, batch: Batch) -> None:
        self._call(batch, inputs_embeds=embeddings[None])

    def _call(self, batch: Batch, **inputs: Tensor) -> Tensor:
        self._batch = batch
        self._slots.set(batch.slots, self.shape.device)
        self._wanted_slots.set(batch.wanted_slots, self.shape.device)
        try:
            result: Any = self._model(
                **inputs, position_ids=batch.positions[None], use_cache=False, logits_to_keep=batch.wanted
            )
        finally:
            self._batch = None
        logits: Tensor = result.logits[0]
        return logits

    @property
    def batch(self) -> Batch:
        assert self._batch is not None, "attention runs inside forward() only"
        return self._batch


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, heads, T, head_dim]` in, `[1, T, heads, head_dim]` out."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    batch, layer = module.qloop_network.batch, module.layer_idx
    batch.write(layer, key, value)
    out = batch.attend(layer, query, scale=options.get("scaling"), window=options.get("sliding_window"))
    return out[None], None


def _bloom_attention(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Bloom's attention does not go through the interface, and has ALiBi."""
    query, key, value = (part[0].transpose(0, 1) for part in self._reshape(self.query_key_value(hidden_states)))
    batch, slopes = self.qloop_network.batch, self.qloop_slopes
    batch.write(self.layer_idx, key, value)
    out = batch.attend(self.layer_idx, query, scale=self.inv_norm_factor, slopes=slopes)
    return self.dense(out.reshape(1, len(out), -1)) + residual, None


def _slopes(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi's `[heads]`: Bloom's own bias between two neighbouring tokens."""
    return build_alibi_tensor(torch.ones(1, 2, device=device), num_heads, torch.float32)[:, 0, 1]
