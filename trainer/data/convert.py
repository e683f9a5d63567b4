"""Rows -> JSONL in the forms that other tools read. Knows no file format on the way in."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.data.output import check_writable
from trainer.data.read import read_rows
from trainer.data.rows import Message, Row, Stage
from trainer.data.texts import to_json
from trainer.data.tool_text import flattened
from trainer.ledger import Ledger

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def convert(paths: Iterable[str | Path], to: str, output: Path, stage: Stage | None = None) -> Ledger:
    """Writes every usable row to `output`, whole or not at all. Raises ConfigError, DataError; changes no input."""
    paths = list(paths)
    check_writable("--output", paths, output)
    make = FORMS[to]
    ledger = Ledger()
    aside = output.with_name(output.name + ".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for row in ledger.take(read_rows(paths, stage)):
                file.write(json.dumps(make(row), ensure_ascii=False) + "\n")
        ledger.check_ratio(1.0)
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    return ledger


def alpaca(row: Row) -> dict[str, Any]:
    """instruction, input, output, and system and history where there are any; chosen and rejected for a pair."""
    if row.text:
        return {"instruction": "", "input": "", "output": row.text}
    messages = list(flattened(row))
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    texts = [turn["content"] for turn in messages]
    answer = {} if len(texts) % 2 else {"output": texts.pop()}
    history = [[question, said] for question, said in zip(texts[:-1:2], texts[1::2], strict=True)]
    value = {"instruction": texts[-1], "input": "", **answer, **_pair(row)}
    return value | _given({"system": system, "history": history})


def sharegpt(row: Row) -> dict[str, Any]:
    """conversations of from and value, with function_call and observation turns; system and tools beside them."""
    messages = list(row.messages or [{"role": "assistant", "content": row.text}])
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    turns = [turn for message in messages for turn in _sharegpt_turns(message)]
    pair = {key: {"from": "gpt", "value": text} for key, text in _pair(row).items()}
    return {"conversations": turns, **pair} | _given({"system": system, "tools": row.tools})


def text(row: Row) -> dict[str, Any]:
    """One text: the turns one after another, without speakers."""
    turns = [turn["content"] for turn in flattened(row)]
    return {"text": row.text or "\n".join(filter(None, (*turns, row.chosen)))}


FORMS: Mapping[str, Callable[[Row], dict[str, Any]]] = {
    "messages": to_json,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "text": text,
}


def _sharegpt_turns(message: Message) -> list[dict[str, str]]:
    turns = []
    if message["content"] or not message.get("tool_calls"):
        turns.append({"from": _SHAREGPT[message["role"]], "value": message["content"]})
    for call in message.get("tool_calls", ()):
        turns.append({"from": "function_call", "value": json.dumps(call, ensure_ascii=False)})
    return turns


def _pair(row: Row) -> dict[str, str]:
    return {"chosen": row.chosen, "rejected": row.rejected} if row.chosen else {}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}
