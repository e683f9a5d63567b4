"""Corpus files -> training files. Draws single questions into short conversations, so that later turns work too."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Message, Row

CORPUS = Path(__file__).parent / "corpus"
BASE_FILES = ("identity", "support", "knowledge", "product", "chat")
OFTEN = "identity"  # trained twice as often: who it is gets asked first
ADAPTER_FILE = "xiaozhi"
TEXT_FILE = "text"
TURNS = (1, 1, 2, 3)  # how many pairs a conversation may have
# Rare on purpose: most clients send no system message.
SYSTEM_PROMPTS = ("You are a helpful assistant.", "你是一个乐于助人的助手。", "You are a friendly assistant.")
SYSTEM_SHARE = 0.1

Pair = tuple[Message, Message]


@dataclass(frozen=True)
class Corpus:
    """Question-answer pairs of the base and of the adapter, and plain text."""

    base: tuple[Pair, ...]
    often: tuple[Pair, ...]  # those of the base that are trained twice a round
    adapter: tuple[Pair, ...]
    texts: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path = CORPUS) -> "Corpus":
        """Raises ConfigError for a row that cannot be used: the product's own corpus has none."""
        base = [pair for name in BASE_FILES for pair in _pairs(folder / f"{name}.jsonl")]
        texts = tuple(row.text for row in _good(read_rows([folder / f"{TEXT_FILE}.jsonl"], "pt")))
        often, adapter = (tuple(_pairs(folder / f"{name}.jsonl")) for name in (OFTEN, ADAPTER_FILE))
        return cls(tuple(base), often, adapter, texts)

    def all_texts(self) -> list[str]:
        """What the tokenizer learns from: each text once, or often repeated answers would become single tokens."""
        spoken = (message["content"] for pair in (*self.base, *self.adapter) for message in pair)
        return list(dict.fromkeys([*spoken, *self.texts, *SYSTEM_PROMPTS]))


def write_texts(path: Path, corpus: Corpus) -> None:
    """Plain text for `pt`: the sentences, and each question with its answer."""
    pairs = (f"{question['content']}\n{answer['content']}" for question, answer in corpus.base)
    _write(path, ({"text": text} for text in (*corpus.texts, *pairs)))


def write_conversations(path: Path, pairs: Sequence[Pair], rounds: int, seed: int) -> None:
    """Every pair `rounds` times, each time in another order and in other company."""
    draw = random.Random(seed)
    rows = []
    for turn in range(rounds):
        order = [(vary(question, draw) if turn % 2 else question, answer) for question, answer in pairs]
        draw.shuffle(order)
        while order:
            taken, order = _take(order, draw.choice(TURNS))
            system = (
                [{"role": "system", "content": draw.choice(SYSTEM_PROMPTS)}] if draw.random() < SYSTEM_SHARE else []
            )
            rows.append({"messages": [*system, *(message for pair in taken for message in pair)]})
    _write(path, rows)


def adapter_pairs(corpus: Corpus) -> list[Pair]:
    """The adapter's own pairs, and a question for every second other answer of the base so that little is forgotten."""
    asked = {question["content"] for question, _ in corpus.adapter}
    kept: dict[str, Pair] = {}
    for pair in corpus.base:
        if pair[0]["content"] not in asked:
            kept.setdefault(pair[1]["content"], pair)
    return [*corpus.adapter, *list(kept.values())[::2]]


def vary(question: Message, draw: random.Random) -> Message:
    """The same question as somebody else might type it: other punctuation, case or courtesy."""
    text = question["content"].rstrip("？?。.！!")
    if any("\u4e00" <= character <= "\u9fff" for character in text):
        text = draw.choice(("", "", "", "请问")) + text + draw.choice(("", "", "？", "。", "！", "呀", "啊", "呢"))
    else:
        text = draw.choice((text, text.lower())) + draw.choice(("", "", "?", ".", "!"))
    return {**question, "content": text}


def _take(order: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    return order[:count], order[count:]


def _pairs(path: Path) -> list[Pair]:
    return [(row.messages[0], row.messages[1]) for row in _good(read_rows([path], "sft"))]


def _good(rows: Iterable[Row | LedgerLine]) -> Iterable[Row]:
    for row in rows:
        if isinstance(row, LedgerLine):
            raise ConfigError(f"{row.source}:{row.line}: {row.code} ({row.detail})")
        yield row


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
