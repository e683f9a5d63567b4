"""A tiny Qwen2 for benchmarks: configuration, tokenizer and template; weights are random, whoever loads it makes them.

Every token of its vocabulary is whole ASCII text, so a server that streams token by token sends one chunk per token.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_TEXT = (
    "the quiet river runs past our old stone house and every morning a small boat carries bread milk and letters "
    "to people who live on the other side of a wide green valley where tall trees keep warm summer rain from falling "
    "on narrow roads"
)
WORDS = _TEXT.split()
CONTEXT = 2048
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_model(folder: Path, num_layers: int = 2) -> Path:
    """`num_layers` sets how long a server that really computes takes for a step; each holds 15 M random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos_id = tokenizer.token_to_id("<|im_end|>")
    _write_json(folder / "config.json", _config(tokenizer.get_vocab_size(), eos_id, num_layers))
    _write_json(folder / "generation_config.json", {"eos_token_id": eos_id})
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": CONTEXT}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "chat_template.jinja").write_text(CHAT_ML)
    return folder


def write_shape(folder: Path, tokenizer: Path | None, config: Mapping[str, Any]) -> Path:
    """A folder of that shape, all but its weights, with the tokenizer of the folder `tokenizer`, or a small one."""
    write_tiny_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if tokenizer and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    special = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    _write_json(folder / "config.json", {**config, **special})
    return folder


def prompt(number: int) -> str:
    """Plain text of about fifty tokens, another one for each number."""
    start = number % len(WORDS)
    return " ".join([*WORDS[start:], *WORDS[:start]])


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'ĠĊ")
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def _config(vocab_size: int, eos_id: int, num_layers: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": eos_id,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))
