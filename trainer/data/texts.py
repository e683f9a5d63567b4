"""What of a row is compared, counted or written. Knows rows; knows no file format and no tokenizer."""

import json
import unicodedata
from typing import Any, Literal

from trainer.data.rows import Row

By = Literal["row", "question", "answer"]


def question_of(row: Row) -> str:
    """Everything the user said; the text of a pt row."""
    return row.text or _said(row, "user")


def answer_of(row: Row) -> str:
    """Everything that is learnt: the assistant's turns, the chosen answer of a pair, the text of a pt row."""
    return row.text or row.chosen or _said(row, "assistant")


def text_of(row: Row, by: By = "row") -> str:
    """The part of a row that `by` names. "row" is all of it but the system prompt, which many rows share."""
    if by == "question":
        return question_of(row)
    if by == "answer":
        return answer_of(row)
    turns = (str(m["content"]) for m in row.messages if m["role"] != "system")
    return row.text or "\n".join(filter(None, (*turns, row.chosen, row.rejected)))


def normalised(text: str) -> str:
    """One spelling for texts that differ in width, case or white space only."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def to_json(row: Row) -> dict[str, Any]:
    """The row in the one form that every command of ours writes and reads back without loss."""
    value: dict[str, Any] = {"text": row.text} if row.text else {"messages": list(row.messages)}
    given = {"chosen": row.chosen, "rejected": row.rejected, "tools": row.tools}
    return {**value, **{key: text for key, text in given.items() if text}, **row.extra}


def to_line(row: Row) -> str:
    """One line of a JSONL file, with its newline."""
    return json.dumps(to_json(row), ensure_ascii=False) + "\n"


def _said(row: Row, role: str) -> str:
    return "\n".join(str(m["content"]) for m in row.messages if m["role"] == role)
