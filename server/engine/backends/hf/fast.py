"""A lean forward pass for Llama-shaped decoders: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3.

It does what the model's own code does and nothing else: query, key and value in one matrix, gate and up in another,
packed weights, rotary angles from a table. Layers are taken apart as they are packed, so that weights exist once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from server.engine.backends.hf.adapter_files import ModelShape
from server.engine.backends.hf.batch import Batch
from server.engine.backends.hf.kv_store import KvShape
from server.engine.backends.hf.probe import PROBE_TOKENS
from server.engine.backends.hf.projection import Projection, SlotMap
from server.engine.backends.hf.weights import Linear, pack

FAST_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def can_run_fast(config: Any) -> bool:
    """True for the shapes this module computes: gated SiLU, RMSNorm, rotary positions on the whole head."""
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return config.model_type in FAST_TYPES and config.hidden_act == "silu" and partial == 1.0


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    qkv: Projection
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None


class FastNetwork:
    """Implements `Network`."""

    def __init__(self, model: PreTrainedModel, shape: KvShape, modules: ModelShape, dtype: str) -> None:
        config: Any = model.config
        self.shape = shape
        self._slots = SlotMap()
        self._wanted_slots = SlotMap()  # the head only sees the tokens whose logits are wanted
        self.projections: dict[str, Projection] = {}
        self._modules = modules
        self._dtype = dtype
        self._eps = config.rms_norm_eps
        self._heads = config.num_attention_heads
        decoder: Any = model.model
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._cos, self._sin = _rotary_table(decoder.rotary_emb, max(modules.max_len, PROBE_TOKENS), shape)
        self._layers = []
        for index in range(len(decoder.layers)):
            self._layers.append(self._take(decoder.layers[index], f"model.layers.{index}"))
            decoder.layers[index] = nn.Identity()  # its weights live on in packed form only
        self._norm: Tensor = decoder.norm.weight
        self._head = self._project(model, ["lm_head"], slots=self._wanted_slots)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self._decode(self._embedding[batch.token_ids], batch)
        self._wanted_slots.set(batch.wanted_slots, self.shape.device)
        logits: Tensor = self._head(rms_norm(hidden[batch.wanted], self._norm.shape, self._norm, self._eps))
        return logits

    def embed_virtual(self, embeddings: Tensor, batch: Batch) -> None:
        self._decode(embeddings.to(self._embedding.dtype), batch)

    def _decode(self, hidden: Tensor, batch: Batch) -> Tensor:
        """`[T, hidden]` through all layers."""
        self._slots.set(batch.slots, self.shape.device)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.norm.shape, layer.norm, self._eps)
            hidden = hidden + layer.out(self._attend(index, layer, normed, batch, cos, sin))
            normed = rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, self._eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(silu(gate).mul_(up))
        return hidden

    def _attend(self, index: int, layer: _Layer, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        num_kv, size = self.shape.num_kv_heads, self.shape.head_dim
        heads = layer.qkv(x).view(len(x), self._heads + 2 * num_kv, size)
        turned, values = torch.split(heads, [self._heads + num_kv, num_kv], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = torch.split(turned, [self._heads, num_kv], dim=1)
            queries = rms_norm(queries, (size,), layer.query_norm, self._eps)
            turned = torch.cat([queries, rms_norm(keys, (size,), layer.key_norm, self._eps)], dim=1)
        turned = _rotate(turned, cos, sin)
        queries, keys = torch.split(turned, [self._heads, num_kv], dim=1)
        return batch.attend(index, queries, keys, values, window=layer.window).flatten(1)

    def _take(self, layer: Any, name: str) -> _Layer:
        attention = layer.self_attn
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return _Layer(
            norm=layer.input_layernorm.weight,
            qkv=self._project(layer, [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")], name),
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            out=self._project(layer, ["self_attn.o_proj"], name),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=self._project(layer, ["mlp.gate_proj", "mlp.up_proj"], name),
            down=self._project(layer, ["mlp.down_proj"], name),
            window=_window(attention),
        )

    def _project(self, root: Any, names: Sequence[str], prefix: str = "", slots: SlotMap | None = None) -> Projection:
        """One matrix of several linear maps that share their input, packed."""
        linears = [root.get_submodule(name) for name in names]
        biases = [linear.bias for linear in linears]
        bias = None
        if any(part is not None for part in biases):
            bias = torch.cat(
                [
                    linear.weight.new_zeros(linear.out_features) if b is None else b
                    for linear, b in zip(linears, biases, strict=True)
                ]
            )
        weights = [linear.weight for linear in linears]
        packed: Linear = pack(weights[0] if len(weights) == 1 else torch.cat(weights), bias, self._dtype)
        parts, end = {}, 0
        for name, linear in zip(names, linears, strict=True):
            start, end = end, end + linear.out_features
            parts[f"{prefix}.{name}" if prefix else name] = slice(start, end)
        projection = Projection(
            packed, parts, linears[0].in_features, slots or self._slots, self.shape.dtype, self.shape.device
        )
        self.projections.update(dict.fromkeys(parts, projection))
        return projection


def _rotary_table(rotary: Any, length: int, shape: KvShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, 1, head_dim]`, the sines of the first half negated so that a roll of the halves is
    all that turning needs."""
    positions = torch.arange(length, device=shape.device)[None]
    cos, sin = rotary(torch.empty(0, dtype=shape.dtype, device=shape.device), positions)
    half = shape.head_dim // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[0][:, None].clone(), sin[0][:, None].clone()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864) on `[T, heads, head_dim]`."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None
