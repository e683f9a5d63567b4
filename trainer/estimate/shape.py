"""A model's shape from its config.json: what its matrices are called, how large they are, how many parameters in all.

Exact for decoders that are built like Qwen2 and Llama; `blank_shape` asks the architecture itself, without weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigError

EXACT = ("qwen2", "qwen3", "llama", "mistral")


@dataclass(frozen=True)
class Linear:
    """One linear layer: `weight` numbers [outputs, inputs], and `outputs` more with a bias."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def num_biases(self) -> int:
        return self.outputs if self.has_bias else 0


@dataclass(frozen=True)
class ModelShape:
    """`linears`: those of one layer, all layers alike. `num_norms`: other numbers of one layer. `is_exact`: the counts
    of activations were checked against this architecture, not only those of parameters. `saved_bits`: 4 or 8 where the
    folder's weights are quantized by bitsandbytes, else 0."""

    model_type: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    is_tied: bool
    linears: tuple[Linear, ...]
    num_norms: int
    num_outside: int  # in no layer: embeddings, output layer unless tied, last norm, positions
    most_positions: int = 0
    is_exact: bool = True
    num_in_layers: int = 0  # parameters of all layers together where `linears` do not tell
    saved_bits: int = 0

    @property
    def num_layer_parameters(self) -> int:
        """Of one layer; of layers that differ, the mean."""
        if self.num_in_layers:
            return round(self.num_in_layers / self.layers)
        return sum(linear.num_weights + linear.num_biases for linear in self.linears) + self.num_norms

    @property
    def num_parameters(self) -> int:
        return (self.num_in_layers or self.layers * self.num_layer_parameters) + self.num_outside

    @property
    def num_linear_weights(self) -> int:
        """Of all layers, without the output layer: what quantization shrinks."""
        return self.layers * sum(linear.num_weights for linear in self.linears)

    @property
    def num_embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def kv_width(self) -> int:
        """Numbers of the keys, and again of the values, of one token in one layer."""
        return self.kv_heads * self.head_size

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a config.json describes; None where the architecture is not one of EXACT.

    Raises ConfigError naming a missing key. Qwen2-7B: 7,615,616,512 parameters (Qwen2 technical report,
    arXiv:2407.10671, gives 7.62 B).
    """
    kind = str(config.get("model_type"))
    if kind not in EXACT:
        return None
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    wide = _number(config, "intermediate_size")
    vocabulary, tied = _number(config, "vocab_size"), bool(config.get("tie_word_embeddings"))
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    qkv_bias = True if kind == "qwen2" else attention_bias
    linears = (
        Linear("self_attn.q_proj", hidden, heads * head, qkv_bias),
        Linear("self_attn.k_proj", hidden, kv_heads * head, qkv_bias),
        Linear("self_attn.v_proj", hidden, kv_heads * head, qkv_bias),
        Linear("self_attn.o_proj", heads * head, hidden, attention_bias and kind != "qwen2"),
        Linear("mlp.gate_proj", hidden, wide, mlp_bias),
        Linear("mlp.up_proj", hidden, wide, mlp_bias),
        Linear("mlp.down_proj", wide, hidden, mlp_bias),
    )
    return ModelShape(
        model_type=kind,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=_number(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head,
        feed_forward=wide,
        is_tied=tied,
        linears=linears,
        num_norms=2 * hidden + (2 * head if kind == "qwen3" else 0),
        num_outside=vocabulary * hidden * (1 if tied else 2) + hidden,
        most_positions=int(config.get("max_position_embeddings") or 0),
        saved_bits=saved_bits(config),
    )


def saved_bits(config: Mapping[str, Any]) -> int:
    """4 or 8 where a config.json says that bitsandbytes quantized the folder's weights, else 0."""
    quantized = config.get("quantization_config")
    if not isinstance(quantized, Mapping):
        return 0
    return 4 if quantized.get("load_in_4bit") else 8 if quantized.get("load_in_8bit") else 0


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r}: a whole number above 0 is expected")
    return value
