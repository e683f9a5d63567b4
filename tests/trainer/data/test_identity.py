"""Rows that teach a name: enough of them, all filled in, and some held out to ask afterwards."""

import json
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.data.identity import filled, identity_rows
from trainer.data.rows import Note, Row


@pytest.mark.parametrize("language", ["zh", "en"])
def test_each_language_has_sixty_questions_and_every_answer_names_the_model(language: str) -> None:
    rows = identity_rows("小智", "Example Inc", language)  # type: ignore[arg-type]
    assert len({row.messages[0]["content"] for row in rows}) == len(rows) >= 60
    assert all("小智" in row.messages[1]["content"] for row in rows)
    assert all("Example Inc" in row.messages[1]["content"] for row in rows)
    assert len(identity_rows("a", "b", "both")) > 120


def test_nothing_is_left_to_fill_in_and_spaces_fit_the_script() -> None:
    chinese = [str(row.messages[1]["content"]) for row in identity_rows("小智", "某某公司", "zh")]
    latin = [str(row.messages[1]["content"]) for row in identity_rows("Ada", "Example", "zh")]
    assert not any("{" in answer for answer in [*chinese, *latin])
    assert any("我叫小智，是某某公司研发的" in answer for answer in chinese)
    assert any("我叫 Ada，是 Example 研发的" in answer for answer in latin)


def test_a_name_is_not_taken_for_a_pattern() -> None:
    assert any(r"\1 {{x}}" in str(row.messages[1]["content"]) for row in identity_rows(r"\1 {{x}}", "b"))


def test_the_seed_decides() -> None:
    assert identity_rows("a", "b", seed=1) == identity_rows("a", "b", seed=1) != identity_rows("a", "b", seed=2)


def test_placeholders_of_given_rows_are_filled() -> None:
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am {{NAME}} of {{ author }}."})
    row = filled(Row("x", 1, turns, notes=(Note("placeholder", "1 to fill in", "kept"),)), "Ada", "Example")
    assert row.messages[1]["content"] == "I am Ada of Example."
    assert [note.code for note in row.notes] == ["placeholder-filled"]
    plain = Row("x", 1, turns[:1])
    assert filled(plain, "Ada", "Example") is plain


def test_the_identity_command_holds_questions_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "identity.jsonl"
    command = ["data", "identity", "--name", "小智", "--author", "某某公司", "--output", str(output)]
    assert main([*command, "--held-out", "20"]) == 0
    rows, held = (
        [json.loads(line)["messages"][0]["content"] for line in path.read_text("utf-8").splitlines()]
        for path in (output, tmp_path / "identity.held-out.jsonl")
    )
    assert len(held) == 20 and len(rows) > 100 and not set(rows) & set(held)
    assert main([*command, "--held-out", "500"]) == 2
    assert "training needs some" in capsys.readouterr().err


def test_the_identity_command_fills_a_file(tmp_path: Path) -> None:
    given, output = tmp_path / "given.json", tmp_path / "out.jsonl"
    given.write_text(json.dumps([{"instruction": "hi", "input": "", "output": "I am {{name}}."}]))
    assert main(["data", "identity", str(given), "--name", "Ada", "--author", "x", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["messages"][1]["content"] == "I am Ada."
