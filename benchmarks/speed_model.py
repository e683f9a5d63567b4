"""A model of Qwen2-0.5B's shape and LoRA adapters for it, all with random weights, and prompts of random ids.

Speed depends on shapes, not on what was learned. Knows nothing about engines.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.tiny_model import CHAT_ML

LAYERS, HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 24, 896, 14, 2, 4864, 151936
KV_WIDTH = HIDDEN // HEADS * KV_HEADS
CONTEXT = 32768
EOS_ID = 151645  # <|im_end|>, as in Qwen2's vocabulary
SPREAD = 0.02
SHORTEST_PROMPT, LONGEST_PROMPT = 24, 88
LINEARS = {  # of each layer: out, in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_WIDTH, HIDDEN),
    "self_attn.v_proj": (KV_WIDTH, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": EOS_ID,
}


def write_model(folder: Path, layers: int = LAYERS) -> Path:
    """The model's folder, made once: about 1 GB in bf16."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=2))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
        _write_tokenizer(folder)
        save_tensors(model_tensors(layers), weights)
    return folder


def bytes_per_step(layers: int = LAYERS) -> int:
    """Weights that one decoding step has to read; the tied embedding is the output layer, so it is read whole."""
    per_layer = sum(rows * columns for rows, columns in LINEARS.values()) + 2 * HIDDEN
    biases = sum(LINEARS[name][0] for name in BIASED)
    return 2 * (layers * (per_layer + biases) + HIDDEN + VOCABULARY * HIDDEN)


def write_lora(folder: Path, rank: int, seed: int, layers: int = LAYERS) -> Path:
    """A PEFT adapter folder: LoRA of `rank` on all linear layers, B not zero; made once."""
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        names = [name.rpartition(".")[2] for name in LINEARS]
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
        config |= {"target_modules": names, "base_model_name_or_path": "random", "inference_mode": True}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        save_tensors(_lora_tensors(rank, seed, layers), weights)
    return folder


def prompts(count: int, seed: int) -> list[list[int]]:
    """`count` prompts of 24 to 88 random ids, 56 on average. The same lengths for every seed, never the same ids."""
    rng = random.Random(f"{count}-{seed}")
    span = LONGEST_PROMPT - SHORTEST_PROMPT
    lengths = [SHORTEST_PROMPT + round(span * (index + 0.5) / count) for index in range(count)]
    return [random_ids(rng, length) for length in lengths]


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, EOS_ID - 1000) for _ in range(count)]


def model_tensors(layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": _random((VOCABULARY, HIDDEN), generator)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in LINEARS.items():
            tensors[f"{prefix}{name}.weight"] = _random(shape, generator)
            if name in BIASED:
                tensors[f"{prefix}{name}.bias"] = _random(shape[:1], generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}


def _lora_tensors(rank: int, seed: int, layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = _random((rank, columns), generator)
            tensors[f"{module}.lora_B.weight"] = _random((rows, rank), generator)
    return tensors


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=generator) * SPREAD).bfloat16()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Aside, then renamed: an interrupted run leaves no half file behind."""
    aside = path.with_suffix(".part")
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.rename(path)


def _write_tokenizer(folder: Path) -> None:
    """Every id but the three control tokens is whole ASCII text, so that each streamed token is one chunk."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{number:x}" for number in range(EOS_ID - 2 - len(letters))]
    vocabulary = {token: number for number, token in enumerate([*letters, *words])}
    tokenizer = TextTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert tokenizer.token_to_id("<|im_end|>") == EOS_ID
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(CHAT_ML)
