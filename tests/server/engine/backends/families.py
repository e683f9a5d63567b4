"""A tiny random model folder of every architecture family that the hf backend promises to serve.

Texts of these models wander: heads are untied or outweighed by the layers, and the layers are scaled up (a plain random
model repeats one token, and agreement on a constant text proves nothing). Knows nothing about backends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.models import make_tokenizer

torch.set_num_threads(1)  # for models this small, more threads only get in each other's way

VOCAB_SIZE = 400
EOS = VOCAB_SIZE - 1
CONTEXT = 256
WINDOW = 20  # shorter than every text that is compared

_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_WIDER = {**_SIZES, "hidden_size": 96, "num_attention_heads": 6}
_IDS = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 0}
_POSITIONS = {"max_position_embeddings": CONTEXT}
_ROTARY = {**_SIZES, **_IDS, **_POSITIONS, "num_key_value_heads": 2, "intermediate_size": 96}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 8,
}
_SPLIT_QKV = (("k_proj", "v_proj"), ("down_proj",))
_FUSED_QKV = (("query_key_value",), ("dense_4h_to_h",))


@dataclass(frozen=True)
class Family:
    """One shape of one architecture, and where adapters act on it."""

    name: str
    config_type: Callable[..., PreTrainedConfig]
    sizes: dict[str, Any]
    attention: tuple[str, ...]  # projections that IA3 and the narrow LoRA act on
    feed_forward: tuple[str, ...]  # modules whose input IA3 scales
    is_tied: bool = False  # embedding and head are one matrix
    seed: int = 0  # one whose text wanders

    @property
    def has_conv1d(self) -> bool:
        """Its matrices lie the other way round, which PEFT wants to be told."""
        return self.config_type is GPT2Config

    def config(self) -> PreTrainedConfig:
        return self.config_type(**self.sizes, tie_word_embeddings=self.is_tied)

    def write(self, folder: Path) -> Path:
        """Save the model as safetensors in float32, the same weights each time."""
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(self.config())
        make_chaotic(model)
        model.generation_config = GenerationConfig(**_IDS)
        model.save_pretrained(folder)
        make_tokenizer().save(str(folder / "tokenizer.json"))
        return folder


FAMILIES = {
    family.name: family
    for family in (
        Family("Qwen2 (tied head)", Qwen2Config, _ROTARY, *_SPLIT_QKV, is_tied=True),
        Family(
            "Qwen2.5, YaRN", Qwen2Config, {**_ROTARY, "num_attention_heads": 8, "rope_parameters": _YARN}, *_SPLIT_QKV
        ),
        Family(
            "Qwen2, some layers with a window",
            Qwen2Config,
            {**_ROTARY, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
            *_SPLIT_QKV,
        ),
        Family("Qwen3", Qwen3Config, {**_ROTARY, "head_dim": 32}, *_SPLIT_QKV),
        Family("Llama, biases", LlamaConfig, {**_ROTARY, "attention_bias": True, "mlp_bias": True}, *_SPLIT_QKV),
        Family("Llama, no GQA", LlamaConfig, {**_ROTARY, "num_key_value_heads": 4}, *_SPLIT_QKV),
        Family(
            "Llama 3, 6 heads share 2",
            LlamaConfig,
            {**_ROTARY, "hidden_size": 48, "num_attention_heads": 6, "rope_parameters": _LLAMA3},
            *_SPLIT_QKV,
        ),
        Family("Mistral, with a window", MistralConfig, {**_ROTARY, "sliding_window": WINDOW}, *_SPLIT_QKV),
        Family("GLM", GlmConfig, {**_ROTARY, "head_dim": 16}, *_SPLIT_QKV),
        Family(
            "GPT-2",
            GPT2Config,
            {**_WIDER, **_IDS, **_POSITIONS, "scale_attn_by_inverse_layer_idx": True},
            ("c_attn",),
            ("mlp.c_proj",),
            seed=7,
        ),
        # Six heads: no power of two, for which ALiBi's slopes have a rule of their own.
        Family(
            "Bloom",
            BloomConfig,
            {**_WIDER, **_IDS},
            *_FUSED_QKV,
            seed=3,
        ),
        Family(
            "OPT",
            OPTConfig,
            {**_SIZES, **_IDS, **_POSITIONS, "ffn_dim": 96, "word_embed_proj_dim": 64},
            ("q_proj", "k_proj"),
            ("fc2",),
            seed=1,
        ),
        # Embeddings narrower than the layers, as OPT-350m has them.
        Family(
            "OPT, narrow embeddings",
            OPTConfig,
            {**_SIZES, **_IDS, **_POSITIONS, "ffn_dim": 96, "word_embed_proj_dim": 32},
            ("q_proj", "k_proj"),
            ("fc2",),
            seed=1,
        ),
        Family(
            "GPT-NeoX", GPTNeoXConfig, {**_SIZES, **_IDS, **_POSITIONS, "intermediate_size": 96}, *_FUSED_QKV, seed=4
        ),
    )
}


@torch.no_grad()
def make_chaotic(model: PreTrainedModel) -> None:
    """Layers that outweigh the residual stream's embedding, and a head peaked enough that two tokens seldom tie.

    Biases and norms, which start as zeros and ones, get values that a mistake with them would show.
    """
    head = model.get_output_embeddings().weight
    kept = {id(head), *(id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding))}
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn(weight.shape) * 0.03)
        elif id(weight) not in kept:
            weight.mul_(8)
    head.mul_(10)


def load(folder: Path) -> PreTrainedModel:
    """The model as stock transformers runs it by default."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
