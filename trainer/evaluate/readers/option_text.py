"""Questions in alpaca form whose right answer is an option's text -> multiple choice.

    "input": "问题：…\\n选项：\\n\\t膜分离法\\n\\t分馏法", "output": "分馏法"

What the instruction asks for (answer with the text) is left out: here every question is asked alike.
"""

import re
from collections.abc import Mapping
from typing import Any

from trainer.data.rows import RowRefused
from trainer.data.turns import text_of
from trainer.evaluate.items import LETTERS
from trainer.evaluate.readers.choice import Choice
from trainer.evaluate.readers.inline_options import joined_lines

_OPTIONS = re.compile(r"\n[ ]*(?:选项|备选项|options|choices)\s*[:：][ ]*\n(?=\t)", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:问题|题目|question)\s*[:：]\s*", re.IGNORECASE)


def is_option_text(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("output"), str) and _OPTIONS.search(_asked(record)) is not None


def option_text(record: Mapping[str, Any]) -> Choice:
    """Raises RowRefused."""
    text = text_of(_asked(record), "the question")
    head = _OPTIONS.search(text)
    if head is None:
        raise RowRefused("no-options", "no tab-indented options stand behind the question")
    options = [joined_lines(option) for option in re.split(r"(?:^|\n)\t", text[head.end() :])[1:]]
    gold = joined_lines(text_of(record.get("output"), "output"))
    question = _QUESTION.sub("", text[: head.start()], count=1).strip()
    if not question:
        raise RowRefused("missing-question", "the question is empty")
    if not gold:
        raise RowRefused("missing-answer", "output is empty")
    options = [option for option in options if option]
    if not 2 <= len(options) <= len(LETTERS):
        raise RowRefused("no-options" if len(options) < 2 else "too-many-options", f"{len(options)} options")
    if options.count(gold) != 1:
        raise RowRefused("duplicate-option" if gold in options else "gold-outside", "output is not one of the options")
    notes = ["equal-wrong-options"] if len(set(options)) < len(options) else []
    return Choice(question, tuple(options), (options.index(gold),), notes=notes)


def _asked(record: Mapping[str, Any]) -> str:
    texts = (record.get("input"), record.get("instruction"))
    return next((text for text in texts if isinstance(text, str) and _OPTIONS.search(text)), "")
