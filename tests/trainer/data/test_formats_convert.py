"""Canonical rows to the forms of other tools, and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.__main__ import main
from trainer.data.convert import FORMS, convert
from trainer.data.read import read_rows
from trainer.data.rows import Row
from trainer.data.tool_text import flattened, uses_tools
from trainer.errors import DataError

CHAT = {
    "messages": [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
PAIR = {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "c"},
    ],
    "tools": '[{"name": "f"}, {"name": "g"}]',
}


def rows(path: Path) -> list[Row]:
    found = list(read_rows([path]))
    assert all(isinstance(row, Row) for row in found)
    return [row for row in found if isinstance(row, Row)]


def said(row: Row) -> tuple[Any, ...]:
    return row.messages, row.text, row.chosen, row.rejected, row.tools


def file_of(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("form", ["messages", "alpaca", "sharegpt"])
@pytest.mark.parametrize("value", [CHAT, PAIR, TOOL], ids=["chat", "pair", "tool"])
def test_a_form_reads_back_as_it_was(tmp_path: Path, form: str, value: Any) -> None:
    source = file_of(tmp_path / "in.jsonl", value)
    convert([source], form, tmp_path / "out.jsonl")
    (before,), (after,) = rows(source), rows(tmp_path / "out.jsonl")
    if value is TOOL and form == "alpaca":  # it has no tools: they become text
        assert said(after) == (flattened(before), "", "", "", "")
    else:
        assert said(after) == said(before)


def test_text(tmp_path: Path) -> None:
    convert(
        [file_of(tmp_path / "in.jsonl", CHAT), file_of(tmp_path / "t.jsonl", {"text": "x"})], "text", tmp_path / "o"
    )
    assert (tmp_path / "o").read_text(encoding="utf-8") == '{"text": "简短\\na\\nb\\nc\\nd"}\n{"text": "x"}\n'


def test_tool_turns_as_text(tmp_path: Path) -> None:
    (row,) = rows(file_of(tmp_path / "in.jsonl", TOOL))
    system, question, call, result, answer = flattened(row)
    assert uses_tools(row)
    assert '<tools>\n{"name": "f"}\n{"name": "g"}\n</tools>' in system["content"] and system["role"] == "system"
    block = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert call == {"role": "assistant", "content": f"b\n{block}\n{block}"}
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert result == {"role": "user", "content": results}
    assert (question["content"], answer["content"]) == ("a", "c")


def test_rows_without_tools_stay_as_they_are(tmp_path: Path) -> None:
    (row,) = rows(file_of(tmp_path / "in.jsonl", CHAT))
    assert not uses_tools(row) and flattened(row) == row.messages


def test_an_input_is_never_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = file_of(tmp_path / "in.jsonl", CHAT)
    with pytest.raises(ConfigError, match="would overwrite the input"):
        convert([tmp_path], "messages", source)
    bad = file_of(tmp_path / "bad.jsonl", {"foo": 1})
    with pytest.raises(DataError, match="none of the 1 rows"):
        convert([bad], "messages", tmp_path / "new" / "out.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    assert set(FORMS) == {"messages", "alpaca", "sharegpt", "text"}


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = file_of(tmp_path / "in.jsonl", *[CHAT] * 9, {"foo": 1})
    assert main(["data", "check", str(source)]) == 3
    shown = capsys.readouterr()
    assert "9         0         1  sft" in shown.out and "unknown-shape 1" in shown.out
    assert "1 of 10 rows (10.0%) cannot be used" in shown.err
    ledger = tmp_path / "out" / "rejects.jsonl"
    assert main(["data", "check", str(source), "--max-reject-ratio", "0.1", "--ledger", str(ledger)]) == 0
    assert [json.loads(line)["code"] for line in ledger.read_text().splitlines()] == ["duplicate"] * 8 + [
        "unknown-shape"
    ]
    output = tmp_path / "out.jsonl"
    assert main(["data", "convert", f"{source}#2", "--to", "alpaca", "--output", str(output)]) == 0
    assert [json.loads(line)["history"] for line in output.read_text().splitlines()] == [[["a", "b"]]] * 2
    assert main(["data", "check", str(tmp_path / "missing.jsonl")]) == 2
    (tmp_path / "empty.jsonl").touch()
    assert main(["data", "check", str(tmp_path / "empty.jsonl")]) == 3
    assert "empty.jsonl: holds no rows" in capsys.readouterr().err
