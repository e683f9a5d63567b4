"""Builds a small model folder for the fake backend: tokenizer, chat template and configuration, no weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTEXT = 512
PADDING_ROWS = 16  # ids that the model has and its tokenizer has not, as Qwen2's real folders have
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "你好，世界。我最近总是睡不着，怎么办？先别着急，睡前一小时放下手机，听一点安静的音乐。",
    "你是谁？我是一个助手，可以回答你的问题，也可以陪你聊聊天。今天天气很好，我们去公园走走吧。",
    "user assistant system The user asks a question and the assistant answers it as well as it can.",
)


def make_tokenizer(
    corpus: Sequence[str] = _CORPUS, vocab_size: int = 400, plain_added_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Qwen2's kind: NFC, its split pattern, byte-level BPE. Rare characters and emoji are cut into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*corpus] * 3, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain_added_tokens])
    return tokenizer


def write_fake_model(folder: Path, context: int = CONTEXT) -> Path:
    """A folder that `QLOOP_ENGINE=fake` can serve."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    im_end = tokenizer.token_to_id("<|im_end|>")
    _write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    _write_json(
        folder / "config.json",
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": tokenizer.get_vocab_size() + PADDING_ROWS,
            "max_position_embeddings": context,
            "eos_token_id": im_end,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
