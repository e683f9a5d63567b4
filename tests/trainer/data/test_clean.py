"""Every rule refuses what it names and nothing near it; every repair changes what it names and no meaning."""

import json
from pathlib import Path

import pytest

from server.errors import ConfigError
from trainer.__main__ import main
from trainer.data.clean import Cleaner
from trainer.data.repairs import REPAIRS, repaired
from trainer.data.rows import LedgerLine, Row
from trainer.data.rules import RULES

GOOD = "感冒通常一周左右自己会好，多喝水，注意休息；发烧超过三天请去医院。"


def chat(question: str, answer: str) -> Row:
    return Row("x.jsonl", 7, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def verdict(row: Row, **chosen: object) -> str | None:
    done = Cleaner.chosen(**chosen).clean(row)  # type: ignore[arg-type]
    return done.code if isinstance(done, LedgerLine) else None


REFUSED = {
    "too-long": chat("怎么办？", "很长。" + "".join(chr(0x4E00 + i % 5000) for i in range(40_000))),
    "too-short": chat("多少？", "5"),
    "says-nothing": chat("感冒吃什么药？", "无。"),
    "asks-nothing": chat("如题", GOOD),
    "no-words": chat("你好吗？", "？？！……"),
    "echo": chat("感冒 吃什么药？", "感冒 吃什么药?"),
    "url": chat("怎么办？", "见 https://example.com/thread/12345678901234567890?page=7"),
    "html": chat("怎么办？", f"<p>{GOOD}</p><br><div>多休息</div>"),
    "advert": chat("怎么办？", GOOD + "详情请加我微信 abc12345。"),
    "repeated": chat("怎么办？", "好的" * 20),
    "mojibake": chat("怎么办？", "感冒".encode().decode("latin-1") + GOOD),
    "refusal": chat("怎么办？", "抱歉，我无法回答这个问题。"),
    "not-chinese": chat("怎么办？", "Drink water and rest for a week."),
    "not-english": chat("What now?", GOOD),
}


def test_every_rule_has_a_row_that_it_refuses() -> None:
    assert set(REFUSED) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_refuses_its_row_and_lets_it_pass_when_off(name: str) -> None:
    default = {rule.name: rule.is_on for rule in RULES}[name]
    assert verdict(REFUSED[name], on=[name]) == name
    assert verdict(REFUSED[name], off=[name]) is None
    assert verdict(REFUSED[name]) == (name if default else None)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "没有关系，下次注意就好。",  # begins like a phrase that says nothing
        "请看 https://example.com 上的说明，里面写得很清楚，照着做就可以了，一步一步来，不要着急，慢慢做完它。",
        "用 `<p>` 和 `<br>`：\n```html\n<p>a</p><div>b</div>\n```",
        "| a | b |\n|------------------------------|\n----------------------------------------\n",
        "圆周率是 3.14，1000000000000000 是十的十五次方",
        "voilà\xa0! L’été à Genève, c'est très agréable — naïve café",
        "哈哈哈哈，微信是一种聊天软件。",
    ],
)
def test_good_answers_pass(answer: str) -> None:
    assert verdict(chat("这是一个问题吗？", answer)) is None


def test_html_passes_where_it_was_asked_for() -> None:
    assert verdict(chat("写一段 HTML", "<p>a</p><p>b</p><p>c</p>")) is None


@pytest.mark.parametrize(
    "text", ["Ã©Ã¨ with accents", "æ„Ÿå†’ä¸€å‘¨", "it\u00e2\u20ac\u2122s", "锟斤拷", "工\ufffd\ufffd\ufffd和知识"]
)
def test_wrongly_decoded_text_is_seen(text: str) -> None:
    assert verdict(chat("a?", text)) == "mojibake"


def test_code_has_no_language() -> None:
    row = chat("写代码", f"{GOOD}\n```python\n{'print(value)' * 9}\nreturn result\n```")
    assert verdict(row, on=["not-chinese"], off=["repeated"]) is None


def test_every_answer_of_a_conversation_is_judged_and_the_turn_named() -> None:
    turns = [*chat("一？", GOOD).messages, *chat("二？", "同上").messages, *chat("三？", GOOD).messages]
    done = Cleaner.chosen().clean(Row("x", 1, tuple(turns)))
    assert isinstance(done, LedgerLine) and (done.code, done.detail.partition(":")[0]) == ("says-nothing", "answer 2")


def test_a_turn_that_only_calls_tools_is_not_judged() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    turns = (
        {"role": "user", "content": "天气？"},
        call,
        {"role": "tool", "content": "晴"},
        *chat("", "今天晴。").messages[1:],
    )
    assert verdict(Row("x", 1, turns), on=["too-short"]) is None


def test_pairs_and_texts_are_judged_too() -> None:
    asked = chat("怎么办？", "").messages[:1]
    assert verdict(Row("x", 1, asked, chosen="无", rejected="好")) == "says-nothing"
    assert verdict(Row("x", 1, text="好的" * 20)) == "repeated"


def test_a_limit_turns_its_rule_on() -> None:
    assert verdict(chat("多少？", "五个"), limits={"too-short": 3}) == "too-short"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"off": ["htlm"]}, "no rule 'htlm'"),
        ({"limits": {"echo": 3}}, "has no limit"),
        ({"limits": {"white-space": 1}}, "no rule"),
    ],
)
def test_unknown_rules_and_limits_are_named(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cleaner.chosen(**chosen)  # type: ignore[arg-type]


REPAIRED = {
    "html-entity": ("a&nbsp;b &lt;c&gt; &#39;d&#39;", "a b <c> 'd'"),
    "control-character": ("a\u200bb\x07c\ufeff", "abc"),
    "full-width": ("ＡＢＣ１２３，好！", "ABC123，好！"),
    "white-space": ("  a\u3000b \r\n\n\n\nc\t\n", "a b\n\nc"),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_a_repair_changes_what_it_names_and_can_be_off(name: str) -> None:
    before, after = REPAIRED[name]
    row, names = repaired(chat("问", before))
    assert row.messages[1]["content"] == after and name in names
    off = [repair for repair in REPAIRS if repair.name != name]
    assert name not in repaired(chat("问", before), off)[1]


@pytest.mark.parametrize(
    "text", ["`&lt;` means <", "family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a\n\nb", "1 < 2 && 3"]
)
def test_repairs_leave_this_alone(text: str) -> None:
    row = chat("问", text)
    assert repaired(row) == (row, ())


def test_repairs_are_stable() -> None:
    for before, _ in REPAIRED.values():
        once, _ = repaired(chat("问", before))
        assert repaired(once) == (once, ())


def test_the_command_writes_good_rows_and_names_every_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [chat("一？", GOOD), chat("二？", "同上"), chat("三？", f" {GOOD}"), chat("四？", "加微信 abc12345")]
    raw, output = tmp_path / "raw.jsonl", tmp_path / "out" / "clean.jsonl"
    lines = [json.dumps({"messages": list(row.messages), "department": "内科"}, ensure_ascii=False) for row in given]
    raw.write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    assert main(["data", "clean", str(raw), "--output", str(output)]) == 0
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][1]["content"] for row in written] == [GOOD, GOOD]
    assert {row["department"] for row in written} == {"内科"}
    ledger = [json.loads(line) for line in (tmp_path / "out" / "clean.rejects.jsonl").read_text().splitlines()]
    assert [(line["line"], line["action"]) for line in ledger] == [
        (2, "dropped"),
        (3, "repaired"),
        (4, "dropped"),
        (5, "dropped"),
    ]
    assert "微信" not in json.dumps(ledger, ensure_ascii=False)
    assert "says-nothing 1" in capsys.readouterr().err


def test_the_command_leaves_nothing_when_no_row_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, output = tmp_path / "raw.jsonl", tmp_path / "clean.jsonl"
    raw.write_text(json.dumps({"messages": list(chat("一？", "无").messages)}), encoding="utf-8")
    assert main(["data", "clean", str(raw), "--output", str(output)]) == 3
    assert "none of the 1 rows" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.rejects.jsonl", "raw.jsonl"]


def test_the_command_never_overwrites_its_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"messages": list(chat("一？", GOOD).messages)}), encoding="utf-8")
    before = raw.read_bytes()
    assert main(["data", "clean", str(tmp_path), "--output", str(raw)]) == 2
    assert "would overwrite" in capsys.readouterr().err and raw.read_bytes() == before
