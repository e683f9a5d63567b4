import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.formats import Reject, Row, read_rows

CHAT = ({"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！😀"})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(CHAT)},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！😀"}]},
        {"conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "你好！😀"}]},
        {"instruction": "你好", "input": "", "output": "你好！😀"},
        {"instruction": "你好", "output": "你好！😀", "system": None, "history": None},
    ],
)
def test_all_formats_give_the_same_conversation(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path / "x.jsonl", row)
    assert list(read_rows(path, "sft")) == [Row(str(path), 1, CHAT)]


def test_alpaca_history_system_and_input(tmp_path: Path) -> None:
    row = {"instruction": "翻译", "input": "cat", "output": "猫", "system": "简短", "history": [["a", "b"]]}
    (found,) = read_rows(write(tmp_path / "x.jsonl", row), "sft")
    assert isinstance(found, Row)
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "简短"), ("user", "a"), ("assistant", "b"), ("user", "翻译\ncat"), ("assistant", "猫"),
    ]  # fmt: skip


def test_sharegpt_system_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    inside = {"conversations": [{"from": "system", "value": "s"}, *turns]}
    beside = {"conversations": turns, "system": "s"}
    one, two = read_rows(write(tmp_path / "x.jsonl", inside, beside), "sft")
    assert isinstance(one, Row) and isinstance(two, Row) and one.messages == two.messages
    assert one.messages[0] == {"role": "system", "content": "s"}


def test_text_rows_for_pre_training(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "天空是蓝的"}, {"text": " "}, {"words": "x"})
    first, second, third = read_rows(path, "pt")
    assert first == Row(str(path), 1, text="天空是蓝的")
    assert second == Reject(str(path), 2, "the text is empty")
    assert third == Reject(str(path), 3, "text must be a string, it is NoneType")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps({"messages": list(CHAT)}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert [(row.line, type(row)) for row in read_rows(path, "sft")] == [(1, Row), (3, Row)]


def test_line_separators_inside_text_do_not_split_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "a\u2028b\u0085c"}, {"text": "d"})
    assert [row.text for row in read_rows(path, "pt") if isinstance(row, Row)] == ["a\u2028b\u0085c", "d"]


def test_a_json_array_is_read_with_positions(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json.dumps([{"messages": list(CHAT)}, 7]), encoding="utf-8")
    good, bad = read_rows(path, "sft")
    assert isinstance(good, Row) and bad == Reject(str(path), 2, "a JSON object is expected, this is a int")


def test_bad_lines_are_reported_with_their_numbers_and_good_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps({"messages": list(CHAT)}).encode()
    path.write_bytes(b"\n".join([good, b"{broken", b'{"messages": "\xff"}', b"[]", good]))
    rows = list(read_rows(path, "sft"))
    assert [(row.line, isinstance(row, Reject)) for row in rows] == [
        (1, False),
        (2, True),
        (3, True),
        (4, True),
        (5, False),
    ]
    reasons = [row.reason for row in rows if isinstance(row, Reject)]
    assert [reason.split("(")[0].strip() for reason in reasons] == [
        "is not valid JSON", "is not UTF-8 text", "a JSON object is expected, this is a list",
    ]  # fmt: skip


def _messages(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": 1}, r"no messages, conversations or instruction; its keys are \['q'\]"),
        ({"messages": "hi"}, "list of objects"),
        ({"messages": []}, "nothing to learn"),
        (_messages(("user", "a")), "nothing to learn"),
        (_messages(("assistant", "a")), "turn 1 is assistant, user was expected"),
        (_messages(("user", "a"), ("user", "b")), "turn 2 is user"),
        (_messages(("user", "a"), ("system", "b")), "turn 2 is system"),
        (_messages(("user", "a"), ("assistant", " ")), "assistant's text in turn 2 is empty"),
        (_messages(("user", ""), ("assistant", "b")), "user's text in turn 1 is empty"),
        (_messages(("user", None), ("assistant", "b")), "content must be a string"),
        (_messages(("human", "a"), ("assistant", "b")), "role 'human' is not one of"),
        (_messages(("user", "\ud800"), ("assistant", "b")), "lone surrogate"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "from 'bing' is not one of"),
        ({"conversations": [{"from": [], "value": "a"}]}, r"from \[\] is not one of"),
        ({"instruction": "a", "output": None}, "output must be a string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history"),
    ],
)
def test_the_reason_names_the_fault(tmp_path: Path, row: Any, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_rows(path, "sft")
    assert isinstance(found, Reject)
    assert re.search(reason, found.reason), found.reason


def test_a_file_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_rows(tmp_path / "missing.jsonl", "sft"))
    (tmp_path / "x.json").write_text("[1,")
    with pytest.raises(ConfigError, match="not a valid JSON array"):
        list(read_rows(tmp_path / "x.json", "sft"))
