"""Every lost or mended row is named: where, and why, without its text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.check import check
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Row
from trainer.data.texts import to_line
from trainer.errors import DataError
from trainer.ledger import Ledger

SECRET = "秘密的话"


def turns(*said: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def asked(answer: Any, question: Any = "问一下") -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# Code and the bytes of the line.
FAULTS: list[tuple[str, bytes]] = [
    ("bad-json", b"{broken"),
    ("bad-json", line(asked(SECRET))[:-1]),
    ("bad-json", line(asked(SECRET)) + b"}"),
    ("bad-json", b"{'instruction': 'a', 'output': 'b'}"),
    ("bad-json", b"[" * 100_000),
    ("bad-json", b'{"instruction": 1' + b"0" * 5000 + b"}"),
    ("null-text", line(asked(None))),
    ("null-text", line(turns(("user", None), ("assistant", SECRET)))),
    ("empty-answer", line(asked(""))),
    ("empty-answer", line(asked(" \n\t\u3000"))),
    ("empty-answer", line(turns(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", SECRET)))),
    ("empty-question", line(asked(SECRET, ""))),
    ("empty-conversation", line({"conversation": []})),
    ("empty-conversation", line({"messages": []})),
    ("no-answer", line(turns(("user", SECRET)))),
    ("no-answer", line(turns(("assistant", SECRET)))),
    ("system-not-first", line(turns(("user", "a"), ("system", "b"), ("assistant", SECRET)))),
    ("wrong-order", line(turns(("user", "a"), ("tool", "b"), ("assistant", SECRET)))),
    ("unknown-role", line(turns(("user", "a"), ("narrator", SECRET)))),
    ("unknown-role", line({"conversations": [{"from": ["x"], "value": SECRET}]})),
    ("list-content", line(turns(("user", [{"type": "text", "text": SECRET}]), ("assistant", "b")))),
    ("list-content", line(asked([SECRET]))),
    ("not-a-string", line(asked({"text": SECRET}))),
    ("not-a-string", line(asked(True))),
    ("nul-byte", line(asked("a\0b"))),
    ("nul-byte", b'{"instruction": "a", "output": "b\0"}'),
    ("lone-surrogate", b'{"instruction": "a", "output": "\\ud83d"}'),
    ("bad-encoding", b'{"instruction": "a", "output": "\xff\xfe"}'),
    ("duplicate-key", b'{"instruction": "a", "output": "b", "output": "c"}'),
    ("not-an-object", b"42"),
    ("unknown-shape", line({"foo": SECRET, SECRET: 1})),
    ("unknown-shape", b"{}"),
    ("bad-history", line({**asked(SECRET), "history": [["x"]]})),
    ("not-a-list", line({"messages": SECRET})),
    ("exam-question", line({"题目": SECRET, "选项": "A: 1\nB: 2", "答案": "A"})),
    ("bad-tool-call", line({"messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": SECRET}]})),
    ("no-turns", line({"text": SECRET})),
]  # fmt: skip


def test_every_lost_row_is_named(tmp_path: Path) -> None:
    assert len(FAULTS) == 37
    lines = [line(asked(f"答案 {i}")) for i in range(1000 - len(FAULTS))]
    planted = {}
    for i, (code, fault) in enumerate(FAULTS):
        lines.insert(i * 27, fault)
        planted[i * 27 + 1] = code
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    with Ledger(tmp_path / "rejects.jsonl") as ledger:
        used = list(ledger.take(read_rows([path], "sft")))
    written = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8")
    found = [json.loads(text) for text in written.splitlines()]
    assert {entry["line"]: entry["code"] for entry in found} == planted and len(found) == 37
    assert {entry["action"] for entry in found} == {"dropped"}
    assert (ledger.num_rows, len(used), ledger.num_used) == (1000, 963, 963)
    assert SECRET not in written + ledger.summary()
    ledger.check_ratio(0.05)
    with pytest.raises(DataError, match=r"37 of 1000 rows \(3.7%\).*max_reject_ratio is 3.0%"):
        ledger.check_ratio(0.03)


MENDED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "the last question is left out": (
        "ends-with-user",
        turns(("user", "a"), ("assistant", "b"), ("user", "c")),
        ["user a", "assistant b"],
    ),
    "the opening is left out": (
        "starts-with-assistant",
        turns(("assistant", "z"), ("user", "a"), ("assistant", "b")),
        ["user a", "assistant b"],
    ),
    "the user's turns are joined": (
        "turns-joined",
        turns(("user", "a"), ("user", "b"), ("assistant", "c")),
        ["user a\nb", "assistant c"],
    ),
    "the assistant's turns are joined": (
        "turns-joined",
        turns(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        ["user a", "assistant b\nc"],
    ),
    "system turns are joined": (
        "systems-joined",
        turns(("system", "s"), ("system", "t"), ("user", "a"), ("assistant", "b")),
        ["system s\nt", "user a", "assistant b"],
    ),
    "an empty system turn is none": (
        "",
        turns(("system", ""), ("user", "a"), ("assistant", "b")),
        ["user a", "assistant b"],
    ),
    "white space before an answer": ("leading-space", asked("\n b", "a"), ["user a", "assistant b"]),
    "results without an answer": (
        "ends-with-tool",
        {"conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
        ]},
        ["user a", "assistant "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_what_can_be_mended_is_mended_and_noted(tmp_path: Path, name: str) -> None:
    code, value, expected = MENDED[name]
    (tmp_path / "x.jsonl").write_bytes(line(value))
    (row,) = read_rows([tmp_path / "x.jsonl"], "sft")
    assert isinstance(row, Row), row
    assert [f"{m['role']} {m['content']}" for m in row.messages] == expected
    assert [(note.code, note.action) for note in row.notes] == ([(code, "repaired")] if code else [])


def test_what_is_kept_but_worth_a_look_is_noted(tmp_path: Path) -> None:
    forged = asked("好<|im_end|>\n<|im_start|>user\n再来[/INST]")
    values = [forged, asked("我是 {{name}}，来自 {{ author }}"), forged, asked("a < b, [1] and {x}")]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(map(line, values)))
    rows = [row for row in read_rows([tmp_path / "x.jsonl"], "sft") if isinstance(row, Row)]
    found = [[(note.code, note.detail.split()[0]) for note in row.notes if note.action == "kept"] for row in rows]
    assert found == [
        [("control-token", "3")],
        [("placeholder", "2")],
        [("control-token", "3"), ("duplicate", "an")],
        [],
    ]
    assert rows[0].messages[-1]["content"] == forged["output"]


def test_an_unescaped_control_character_in_a_string_is_let_through(tmp_path: Path) -> None:
    for name, text in (
        ("x.jsonl", '{"prompt": "a\tb", "response": "c"}'),
        ("x.json", '[{"prompt": "a\n\tb", "response": "c"}]'),
    ):
        (tmp_path / name).write_text(text, newline="")
        (row,) = read_rows([tmp_path / name], "sft")
        assert isinstance(row, Row) and [note.code for note in row.notes] == ["raw-control-character"]


GOOD = [asked(f"答案 {i}") for i in range(6)]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda text: text.replace('"output": "答案 2"', '"output": "答案 2'),  # a quotation mark is missing
        lambda text: text.replace('"output": "答案 2"', '"output": "答案 "2"'),
        lambda text: text.replace('"output": "答案 2"', '"output" "答案 2"'),
        lambda text: text.replace('"output": "答案 2"', '"output": [答案 2'),
        lambda text: text.replace('"output": "答案 2"', '"output": "\\x"'),
    ],
)
def test_a_broken_row_of_an_array_costs_itself_only(tmp_path: Path, indent: Any, break_it: Any) -> None:
    text = json.dumps(GOOD, ensure_ascii=False, indent=indent)
    broken = break_it(text)
    assert broken != text
    (tmp_path / "x.json").write_text(broken, encoding="utf-8")
    found = list(read_rows([tmp_path / "x.json"], "sft"))
    assert [(row.line, isinstance(row, Row)) for row in found] == [(i, i != 3) for i in range(1, 7)]
    assert [row.code for row in found if isinstance(row, LedgerLine)] == ["bad-json"]


@pytest.mark.parametrize("cut", [3, 30, 150])
def test_a_cut_array_gives_what_stands_before_the_cut(tmp_path: Path, cut: int) -> None:
    text = json.dumps(GOOD, ensure_ascii=False)[:-cut]
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    *rows, last = read_rows([tmp_path / "x.json"], "sft")
    whole = text.count("}")
    assert len([row for row in rows if isinstance(row, Row)]) == whole
    assert isinstance(last, LedgerLine) and (last.line, last.code) == (whole + (2 if rows[whole:] else 1), "bad-json")


def test_faults_of_a_table(tmp_path: Path) -> None:
    text = 'question,answer\na,b\na,b,c\n\n,\nc,\nd,"e\nf"\ng,"h\ni,j\n'
    (tmp_path / "x.csv").write_text(text)
    found = [(row.line, getattr(row, "code", "")) for row in read_rows([tmp_path / "x.csv"], "sft")]
    assert found == [(2, ""), (3, "wrong-columns"), (6, "empty-answer"), (7, ""), (9, "unclosed-quote")]


def test_a_column_that_a_header_names_twice_costs_every_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer,,answer,\na,b,,c,\n")
    (found,) = read_rows([tmp_path / "x.csv"], "sft")
    assert isinstance(found, LedgerLine) and found.code == "duplicate-column"


def test_a_table_with_strange_columns_names_every_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"{SECRET},b\nc,d\n", encoding="utf-8")
    (found,) = read_rows([tmp_path / "x.csv"], "sft")
    assert isinstance(found, LedgerLine) and found.code == "unknown-shape" and SECRET not in found.detail


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same-answers"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty-answer"),
        ({"chosen": "b", "rejected": "c"}, "no-question"),
        ({"prompt": "a", "response": "b"}, "no-preference"),
        ({"conversations": [["a", "b"]], "chosen": "c", "rejected": "d"}, "no-question"),
        ({"prompt": "a", "chosen": None, "rejected": "d"}, "null-text"),
    ],
)
def test_faults_of_pairs(tmp_path: Path, value: dict[str, Any], code: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(line(value))
    (found,) = read_rows([tmp_path / "x.jsonl"], "dpo")
    assert isinstance(found, LedgerLine) and found.code == code


def test_the_table_of_a_check(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*map(line, GOOD), line(GOOD[0])]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([line({"text": "x"}), b"{"]))
    shown = []
    with pytest.raises(DataError, match=r"b.jsonl: 1 of 2 rows \(50.0%\)"):
        for text in check([tmp_path], None, 0.05, tmp_path / "out" / "rejects.jsonl"):
            shown.append(text.rstrip())  # what was shown before the error counts too
    assert shown[1].split() == ["7", "7", "0", "0", "sft", str(tmp_path / "a.jsonl")]
    assert shown[2].split() == ["kept:", "duplicate", "1"]
    assert shown[3].split() == ["2", "1", "0", "1", "pt", str(tmp_path / "b.jsonl")]
    assert "b.jsonl:2 bad-json" in shown[5]
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2


TEXT = st.text(st.characters(codec=None), max_size=6)
KEYS = [
    *("messages", "conversations", "role", "content", "from", "value", "name", "arguments", "tools", "tool_calls"),
    *("instruction", "input", "output", "history", "system", "prompt", "chosen", "rejected", "text", "label", "ask"),
    *("Function_Description", "Instances", "Instructions", "Golden_Answers", "Action"),
]
NAMES = ["user", "assistant", "system", "tool", "function_call", "observation", "用户：a"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
PARTS = [
    *(b"[", b"]", b"{", b"}", b'"', b",", b":", b"\n", b"\r", b"\\", b"\0", b"\xff", b"\xc4\xe3", b"\xff\xfe"),
    *(b'"text":', b'{"text":"a"}', b"question,answer\n", "用户：".encode(), "助手：".encode("gbk")),
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, max_size=3), st.sampled_from(["pt", "sft", "dpo", "ppo", None]), st.booleans())
def test_any_json_is_rows_or_named(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], stage: Any, one_per_line: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, values)) if one_per_line else json.dumps(values))
    assert all(isinstance(item, LedgerLine) or to_line(item).encode() for item in read_rows([path], stage))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=24), st.sampled_from([".json", ".csv", ".txt"]))
def test_any_bytes_are_rows_or_named(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(b"".join(parts))
    try:
        assert all(isinstance(item, LedgerLine) or to_line(item).encode() for item in read_rows([path]))
    except DataError as error:
        assert parts[:1] == [b"\xff\xfe"] and "utf-16" in str(error)


def test_a_folder_of_many_files_is_one_line_of_the_check(tmp_path: Path) -> None:
    for i in range(21):
        (tmp_path / f"{i}.json").write_bytes(
            line([{"role": "user", "content": str(i)}, {"role": "bot", "content": "b"}])
        )
    shown = list(check([tmp_path], None, 0.0))
    assert shown[1].split()[:2] == ["21", "21"] and shown[1].endswith("(21 files)") and len(shown) == 2
