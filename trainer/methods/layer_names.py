"""What the linear layers of each family of models are called. Knows no model code, only names.

Adapters are asked for in Qwen2's and Llama's words (`q_proj`, `down_proj`), which most recipes use; other families call
the same layers otherwise, or keep several in one matrix.
"""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

ALL_LINEAR = "all-linear"
_ALL = ("all", "all-linear", "all_linear")
_WHOLE_LAYERS = re.compile(r"(model\.|transformer\.)?(decoder\.)?(layers|h)\.?")  # DeepSpeed-Chat's lora_module_name
_PATTERN_SIGNS = re.compile(r"[*+?()|\\^$\[\]]")


@dataclass(frozen=True)
class LayerNames:
    """One family's names for Llama's seven linear layers, as ends of dotted names."""

    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"

    @property
    def attention(self) -> tuple[str, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    @property
    def mlp(self) -> tuple[str, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def scaled_outputs(self) -> tuple[str, ...]:
        """What IA3 scales the output of: keys and values (Liu et al. 2022, arXiv:2205.05638, section 3.3)."""
        return _unique((self.k_proj, self.v_proj))

    @property
    def scaled_inputs(self) -> tuple[str, ...]:
        """What IA3 scales the input of: the second feed-forward matrix."""
        return (self.down_proj,)


_LLAMA = LayerNames()
_FUSED = ("query_key_value",) * 3
NAMES: dict[str, LayerNames] = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral"), _LLAMA),
    "glm": LayerNames(gate_proj="gate_up_proj", up_proj="gate_up_proj"),
    "gpt2": LayerNames(*("attn.c_attn",) * 3, "attn.c_proj", *("mlp.c_fc",) * 2, "mlp.c_proj"),
    "bloom": LayerNames(*_FUSED, "self_attention.dense", *("dense_h_to_4h",) * 2, "dense_4h_to_h"),
    "opt": LayerNames(o_proj="out_proj", gate_proj="fc1", up_proj="fc1", down_proj="fc2"),
    "gpt_neox": LayerNames(*_FUSED, "attention.dense", *("dense_h_to_4h",) * 2, "dense_4h_to_h"),
    # Remote-code models, by the names in their published code.
    "chatglm": LayerNames(*_FUSED, "self_attention.dense", *("dense_h_to_4h",) * 2, "dense_4h_to_h"),
    "baichuan": LayerNames(*("W_pack",) * 3),
    "qwen": LayerNames(*("attn.c_attn",) * 3, "attn.c_proj", "mlp.w2", "mlp.w1", "mlp.c_proj"),
}


def resolve_targets(wanted: Sequence[str] | str, model_type: str) -> str | list[str]:
    """`lora_target` as PEFT takes it: "all-linear", a pattern, or names.

    Accepted are all (every linear layer but the head), attention, mlp, Llama's names (put into the family's own where
    it is known), any layer name of the model itself, and one regular expression over whole dotted names.
    """
    given = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [name.strip() for item in given for name in _split(item) if name.strip()]
    if not names or any(name.lower() in _ALL or _WHOLE_LAYERS.fullmatch(name) for name in names):
        return ALL_LINEAR
    if len(names) == 1 and _PATTERN_SIGNS.search(names[0]):
        return names[0]
    family = NAMES.get(model_type, _LLAMA)
    own = set(astuple(family))
    resolved: list[str] = []
    for name in names:
        if name in ("attention", "mlp"):
            resolved += getattr(family, name)
        else:
            resolved.append(name if name in own else getattr(family, name, name) if name in _LLAMA_NAMES else name)
    return sorted(set(resolved))


def _split(item: str) -> list[str]:
    return [item] if _PATTERN_SIGNS.search(item) else item.split(",")


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


_LLAMA_NAMES = frozenset(astuple(_LLAMA))
