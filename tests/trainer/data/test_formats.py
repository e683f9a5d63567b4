"""Thirteen formats, and the others that are recognised: one canonical form, equal byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.convert import convert
from trainer.data.read import read_rows, stage_of
from trainer.data.rows import LedgerLine, Row

ONE = '{"messages": [{"role": "user", "content": "茶凉了吗？"}, {"role": "assistant", "content": "还温着😀"}]}\n'
TWO = (
    '{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}, '
    '{"role": "user", "content": "茶凉了吗？"}, {"role": "assistant", "content": "还温着😀"}]}\n'
)
Q, A = "茶凉了吗？", "还温着😀"
THIRTEEN: dict[str, tuple[Any, str]] = {
    "alpaca": ({"instruction": "茶凉了", "input": "吗？", "output": A}, ONE.replace("凉了吗", "凉了\\n吗")),
    "alpaca with history": ({"instruction": Q, "input": "", "output": A, "history": [["你好", "你好！"]]}, TWO),
    "sharegpt human and gpt": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "简短"},
        ONE.replace('{"role": "user"', '{"role": "system", "content": "简短"}, {"role": "user"', 1),
    ),
    "conversations user and assistant": (
        {
            "id": "7",
            "source": "cot",
            "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}],
        },
        ONE.replace("}]}", '}], "id": "7", "source": "cot"}'),
    ),
    "messages": ({"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, ONE),
    "prompt and response": ({"prompt": Q, "response": A}, ONE),
    "content and summary": ({"content": Q, "summary": A}, ONE),
    "firefly kind input target": ({"kind": "问答", "input": Q, "target": A}, ONE.replace("}]}", '}], "kind": "问答"}')),
    "firefly conversation": (
        {"conversation": [{"human": "你好", "assistant": "你好！"}, {"human": Q, "assistant": A}]},
        TWO,
    ),
    "question and answer": ({"question": Q, "answer": A}, ONE),
    "query response history": ({"query": Q, "response": A, "history": [["你好", "你好！"]]}, TWO),
    "text": ({"text": "山高\n水长"}, '{"text": "山高\\n水长"}\n'),
}
OTHERS: dict[str, tuple[Any, str]] = {
    "instruct and output": ({"instruct": Q, "output": A}, ONE),
    "Chinese column names": ({"问题": Q, "答案": A}, ONE),
    "names in capitals": ({"Question": Q, "Answer": A}, ONE),
    "history as an empty string": ({"instruction": Q, "output": A, "history": "", "system": None}, ONE),
    "history of objects": ({"prompt": Q, "response": A, "history": [{"prompt": "你好", "response": "你好！"}]}, TWO),
    "conversation of system input output": (
        {"conversation": [{"system": "", "input": "你好", "output": "你好！"}, {"input": Q, "output": A}]},
        TWO,
    ),
    "prompt and completion as turns": (
        {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
        ONE,
    ),
    "a list of named turns": ([{"role": "client", "content": Q}, {"role": "counselor", "content": A}], ONE),
    "a list of spoken turns": (["求助者：" + Q, "支持者：" + A], ONE),
    "a list of pairs": ({"messages": [["你好", "你好！"], [Q, A]]}, TWO),
}


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def canonical(path: Path, tmp_path: Path) -> str:
    convert([path], "messages", tmp_path / "out" / "rows.jsonl")
    return (tmp_path / "out" / "rows.jsonl").read_bytes().decode()


@pytest.mark.parametrize("name", [*THIRTEEN, *OTHERS])
def test_thirteen_formats_give_one_canonical_form(tmp_path: Path, name: str) -> None:
    value, golden = (THIRTEEN | OTHERS)[name]
    line = json.dumps(value, ensure_ascii=False)
    pretty = json.dumps([value, value], ensure_ascii=False, indent=2)
    assert canonical(written(tmp_path / "a.jsonl", f"{line}\n{line}\n"), tmp_path) == golden * 2
    assert canonical(written(tmp_path / "b.json", pretty), tmp_path) == golden * 2


def test_thirteen_formats_ask_and_answer_in_gb18030(tmp_path: Path) -> None:
    table = 'department,title,ask,answer\r\n内科,头晕,"我\r\n头晕",多休息\r\n外科,手疼,无,看医生\r\n'
    golden = [
        [("user", "我\r\n头晕"), ("assistant", "多休息"), "内科"],
        [("user", "手疼"), ("assistant", "看医生"), "外科"],
    ]
    rows = [
        json.loads(line) for line in canonical(written(tmp_path / "x.csv", table, "gb18030"), tmp_path).splitlines()
    ]
    assert [[*((m["role"], m["content"]) for m in row["messages"]), row["department"]] for row in rows] == golden
    found = list(read_rows([tmp_path / "x.csv"], "sft"))
    assert [row.line for row in found] == [2, 4]
    assert [[note.code for note in row.notes] for row in found if isinstance(row, Row)] == [[], ["question-from-title"]]


def test_one_file_may_mix_shapes(tmp_path: Path) -> None:
    values = [value for value, golden in (THIRTEEN | OTHERS).values() if golden == ONE and isinstance(value, dict)]
    path = written(tmp_path / "x.json", json.dumps(values, ensure_ascii=False))
    assert canonical(path, tmp_path) == ONE * len(values)


@pytest.mark.parametrize("parting", ["\n\n", "\r\n\r\n", "\n"])
def test_a_text_file_of_speakers_is_one_conversation(tmp_path: Path, parting: str) -> None:
    said = ["来访者：你好", "心理咨询师：你好！", f"来访者: {Q}", f"心理咨询师：{A}"]
    assert canonical(written(tmp_path / "x.txt", parting.join(said)), tmp_path) == TWO


def test_rules_part_conversations_of_a_text_file(tmp_path: Path) -> None:
    text = f"第一例\n用户：{Q}\n助手：{A}\n---\n用户：{Q}\n再说一遍\n助手：{A}\n"
    first, second = read_rows([written(tmp_path / "x.txt", text)], "sft")
    assert isinstance(first, Row) and isinstance(second, Row)
    assert [note.code for note in first.notes] == ["heading-dropped"]
    assert (second.line, second.messages[0]["content"]) == (5, f"{Q}\n再说一遍")


def test_plain_text_is_documents_for_pre_training(tmp_path: Path) -> None:
    path = written(tmp_path / "x.txt", "第一段\n续\n\n\n第二段\n")
    assert [(row.line, row.text) for row in read_rows([path], "pt") if isinstance(row, Row)] == [
        (1, "第一段\n续"),
        (5, "第二段"),
    ]


PAIRS: dict[str, Any] = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": A},
        "rejected": {"from": "gpt", "value": "凉了"},
    },
    "ranked outputs": {"instruction": Q, "input": "", "output": [A, "不知道", "凉了"], "history": []},
    "alpaca": {"instruction": Q, "input": "", "chosen": A, "rejected": "凉了"},
    "strings": {"prompt": Q, "chosen": A, "rejected": "凉了"},
    "turns": {
        "prompt": [{"role": "user", "content": Q}],
        "chosen": [{"role": "assistant", "content": A}],
        "rejected": [{"role": "assistant", "content": "凉了"}],
    },
    "whole conversations": {
        "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
        "rejected": [{"role": "user", "content": Q}, {"role": "assistant", "content": "凉了"}],
    },
    "one string each": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: 凉了",
    },
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_preference_pairs(tmp_path: Path, name: str, stage: Any) -> None:
    path = written(tmp_path / "x.json", json.dumps([PAIRS[name]]))
    (row,) = read_rows([path], stage)
    assert isinstance(row, Row), row
    assert (row.messages, row.chosen, row.rejected) == (({"role": "user", "content": Q},), A, "凉了")
    assert stage_of(path) == "dpo"
    (refused,) = read_rows([path], "sft")
    assert isinstance(refused, LedgerLine) and refused.code == "preference-row"


def test_ppo_takes_questions_from_any_row(tmp_path: Path) -> None:
    values = [{"prompt": Q}, {"prompt": Q, "response": A}, PAIRS["sharegpt"], {"text": "x"}]
    path = written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, values)))
    *rows, refused = read_rows([path], "ppo")
    assert [row.messages for row in rows if isinstance(row, Row)] == [({"role": "user", "content": Q},)] * 3
    assert isinstance(refused, LedgerLine) and refused.code == "no-turns"


CALL = {"name": "weather", "arguments": {"city": "北京"}}
TOOLS = [{"name": "weather", "description": "天气"}]
CALLED = [
    ("user", "北京热吗", None),
    ("assistant", "", [CALL]),
    ("tool", '{"t": 31}', None),
    ("assistant", "31 度", None),
]
TOOL_ROWS: dict[str, Any] = {
    "function_call and observation": {
        "conversations": [
            {"from": "human", "value": "北京热吗"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"t": 31}'},
            {"from": "gpt", "value": "31 度"},
        ],
        "tools": json.dumps(TOOLS, ensure_ascii=False),
    },
    "openai": {
        "messages": [
            {"role": "user", "content": "北京热吗"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": '{"t": 31}'},
            {"role": "assistant", "content": "31 度"},
        ],
        "tools": TOOLS,
    },
    "chatglm": {
        "tools": TOOLS,
        "conversations": [
            {"role": "user", "content": "北京热吗"},
            {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": {"t": 31}},
            {"role": "assistant", "content": "31 度"},
        ],
    },
    "toolalpaca": {
        "Function_Description": {"weather": "天气", "components": ""},
        "Instances": [
            {
                "input": "北京热吗",
                "output": "31 度",
                "intermediate_steps": [[["weather", '{"city": "北京"}', "想"], '{"t": 31}']],
            }
        ],
    },
}


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_tool_turns(tmp_path: Path, name: str) -> None:
    (row,) = read_rows([written(tmp_path / "x.json", json.dumps([TOOL_ROWS[name]]))])
    assert isinstance(row, Row), row
    assert [(m["role"], m["content"], m.get("tool_calls")) for m in row.messages] == CALLED
    assert json.loads(row.tools) == TOOLS


def test_a_record_of_several_questions_gives_several_rows(tmp_path: Path) -> None:
    value = {
        "Function_Description": {"weather": "天气"},
        "Instructions": ["北京热吗", "上海呢"],
        "Golden_Answers": [
            [{"Action": "weather", "Action_Input": '{"city": "北京"}'}],
            [{"Action": "x", "Action_Input": "{"}],
        ],
    }
    good, bad = read_rows([written(tmp_path / "x.json", json.dumps([value]))])
    assert isinstance(good, Row) and good.messages[-1]["tool_calls"] == [CALL]
    assert isinstance(bad, LedgerLine) and bad.code == "bad-tool-call"
