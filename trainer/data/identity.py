"""Rows that teach a model who it is: questions and answers for a name and an author. Knows no data files."""

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from server.errors import ConfigError
from trainer.data.rows import Note, Row

TEMPLATES = Path(__file__).parent / "identity_templates.json"
Language = Literal["zh", "en", "both"]
# As the usual self-cognition files write them: {{name}}, {{NAME}}, {{ author }}.
_PLACE = re.compile(r"\{\{\s*(name|author)\s*\}\}", re.IGNORECASE)
_AFTER_CJK = re.compile(r"(?<=[\u2e80-\u9fff]) (?=[\u2e80-\u9fff])|(?<=[，。：；]) | (?=[，。：；])")


def filled(row: Row, name: str, author: str) -> Row:
    """The row with every {{name}} and {{author}} filled in, and a note if there was one."""
    values = {"name": name, "author": author}

    def fill(text: str) -> str:
        return _PLACE.sub(lambda found: values[found[1].lower()], text)

    better = replace(
        row,
        messages=tuple({**message, "content": fill(str(message["content"]))} for message in row.messages),
        text=fill(row.text),
        chosen=fill(row.chosen),
        rejected=fill(row.rejected),
    )
    if better == row:
        return row
    notes = [note for note in row.notes if note.code != "placeholder"]  # the reader's warning, no longer true
    return replace(better, notes=(*notes, Note("placeholder-filled")))


def identity_rows(name: str, author: str, language: Language = "both", seed: int = 42) -> list[Row]:
    """Every question of the templates with one of its answers, filled in; the order is drawn."""
    draw = random.Random(seed)
    rows = [_row(question, answers, name, author, draw) for question, answers in _questions(language)]
    draw.shuffle(rows)
    return rows


def hold_out(rows: Iterable[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The last `count` of the rows are kept away from training, to ask them afterwards. Raises ConfigError."""
    listed = list(rows)
    if not 0 <= count < len(listed):
        raise ConfigError(f"--held-out {count}: there are {len(listed)} questions, and training needs some")
    return listed[: len(listed) - count], listed[len(listed) - count :]


def _questions(language: Language) -> Iterator[tuple[str, list[str]]]:
    groups: list[dict[str, Any]] = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    for group in groups:
        if language in ("both", group["language"]):
            yield from ((question, group["answers"]) for question in group["questions"])


def _row(question: str, answers: list[str], name: str, author: str, draw: random.Random) -> Row:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": draw.choice(answers)})
    row = replace(filled(Row("identity", 0, turns), name, author), notes=())
    # The templates set a space between Chinese and Latin; a Chinese name needs none.
    return replace(row, messages=tuple({**m, "content": _AFTER_CJK.sub("", m["content"])} for m in row.messages))
