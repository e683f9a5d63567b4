"""Published shapes, and small ones of each family."""

from typing import Any

QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "pad_token_id": 151643,
}
QWEN2_HALF_B: dict[str, Any] = {
    **QWEN2_7B,
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3 biased": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "bloom": {"model_type": "bloom", "n_layer": 3, "n_head": 4},
    "opt": {"model_type": "opt", "ffn_dim": 160, "word_embed_proj_dim": 64},
    "gpt_neox": {"model_type": "gpt_neox"},
    "qwen2_moe": {  # the first layer dense, the others with experts
        "model_type": "qwen2_moe",
        "mlp_only_layers": [0],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
    },
}


def small(family: str) -> dict[str, Any]:
    return {**SMALL, **FAMILIES[family]}
