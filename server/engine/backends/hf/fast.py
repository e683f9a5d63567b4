"""A lean forward pass for Llama-shaped decoders: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3.

It does what the model's own code does and nothing else: query, key and value in one matrix, gate and up in another,
packed weights, rotary angles from a table. Layers are taken apart as they are packed, so that weights exist once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.backends.hf.arithmetic import Arithmetic, Heads, TorchArithmetic
from server.engine.backends.hf.batch import Batch
from server.engine.backends.hf.kv_store import KvShape
from server.engine.backends.hf.native import Kernels
from server.engine.backends.hf.probe import PROBE_TOKENS
from server.engine.backends.hf.projection import Projection
from server.engine.backends.hf.slots import SlotMap
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
    heads: Heads
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    window: int | None


class FastNetwork:
    """Implements `Network`. `kernels` are used where the model's sizes suit them."""

    def __init__(
        self, model: PreTrainedModel, shape: KvShape, max_len: int, dtype: str, kernels: Kernels | None
    ) -> None:
        config: Any = model.config
        self.shape = shape
        self._slots = SlotMap()
        self._wanted_slots = SlotMap()  # the head only sees the tokens whose logits are wanted
        self.projections: dict[str, Projection] = {}
        self._dtype = dtype
        self._kernels = kernels
        self._arithmetic: Arithmetic = TorchArithmetic()
        if kernels is not None and kernels.suits(shape, config.hidden_size, config.intermediate_size):
            self._arithmetic = kernels
        self._eps: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        decoder: Any = model.model
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._cos, self._sin = _rotary_table(decoder.rotary_emb, max(max_len, PROBE_TOKENS), shape)
        self._layers = []
        for index in range(len(decoder.layers)):
            self._layers.append(self._take(decoder.layers[index], f"model.layers.{index}"))
            decoder.layers[index] = nn.Identity()  # its weights live on in packed form only
        self._norm: Tensor = decoder.norm.weight
        self._head = self._project(model, ["lm_head"], slots=self._wanted_slots)

    def forward(self, batch: Batch) -> Tensor:
        hidden, delta = self._decode(self._embedding[batch.token_ids], batch)
        self._wanted_slots.set(batch.wanted_slots, self.shape.device)
        normed = self._arithmetic.add_and_norm(hidden[batch.wanted], delta[batch.wanted], self._norm, self._eps)
        logits: Tensor = self._head(normed)
        return logits

    def embed_virtual(self, embeddings: Tensor, batch: Batch) -> None:
        self._decode(embeddings.to(self._embedding.dtype, copy=True), batch)

    def _decode(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[T, hidden]` through all layers, in place; the sum of what is returned is the last layer's output."""
        self._slots.set(batch.slots, self.shape.device)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        compute, delta = self._arithmetic, None
        for index, layer in enumerate(self._layers):
            normed = compute.add_and_norm(hidden, delta, layer.norm, self._eps)
            queries = compute.turn_and_store(layer.qkv(normed), layer.heads, cos, sin, index, batch)
            delta = layer.out(batch.attend(index, queries, window=layer.window).flatten(1))
            normed = compute.add_and_norm(hidden, delta, layer.mlp_norm, self._eps)
            delta = layer.down(compute.silu_and_multiply(layer.gate_up(normed)))
        assert delta is not None
        return hidden, delta

    def _take(self, layer: Any, name: str) -> _Layer:
        attention = layer.self_attn
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return _Layer(
            norm=layer.input_layernorm.weight,
            qkv=self._project(layer, [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")], name),
            heads=Heads(
                heads=self._heads,
                kv_heads=self.shape.num_kv_heads,
                size=self.shape.head_dim,
                query_norm=None if query_norm is None else query_norm.weight,
                key_norm=None if key_norm is None else key_norm.weight,
                epsilon=self._eps,
            ),
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
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        packed: Linear = pack(weight, bias, self._dtype, self._kernels)
        parts, end = {}, 0
        for name, linear in zip(names, linears, strict=True):
            start, end = end, end + linear.out_features
            parts[f"{prefix}.{name}" if prefix else name] = slice(start, end)
        projection = Projection(
            packed,
            parts,
            linears[0].in_features,
            slots or self._slots,
            self.shape.dtype,
            self.shape.device,
            self._kernels,
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


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None
