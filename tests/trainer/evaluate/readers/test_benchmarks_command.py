from pathlib import Path

import pytest

from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.__main__ import main
from trainer.errors import DataError


def run(*words: object) -> int:
    return main(["benchmarks", *map(str, words)])


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_the_table_counts_what_went_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.ceval(tmp_path / "ceval")
    files.bbh(tmp_path / "bbh")
    assert run(tmp_path / "ceval", tmp_path / "bbh") == 0
    table = rows(capsys.readouterr().out)
    assert table["ceval"][:6] == ["4", "2", "1", "1", "missing-answer", "1"]
    assert table["bbh"][:5] == ["4", "2", "2", "0", "-"]
    assert table["total"][:4] == ["8", "4", "3", "1"]


def test_a_line_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.mmcu(tmp_path)
    assert run(tmp_path, "--files") == 0
    table = rows(capsys.readouterr().out)
    assert table[f"{tmp_path}/test/医疗.xlsx#内科2题"][:4] == ["2", "2", "0", "0"]
    assert table[f"{tmp_path}/dev/医疗.xlsx#Sheet1"][:4] == ["1", "0", "1", "0"]


def test_items_are_shown_with_the_right_option_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.cpsyexam(tmp_path)
    files.spider(tmp_path / "spider")
    files.text(tmp_path / "text")
    assert run(tmp_path, "--show", 1) == 0
    text = capsys.readouterr().out
    assert "* A. 感觉" in text
    assert "* SELECT count(*) FROM pet" in text
    assert "user: 类型#裤" in text
    assert "KG-普通心理学.json:1" in text


def test_nothing_to_score_is_an_error_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.ceval(tmp_path)
    assert run(tmp_path / "test/law_test.csv", "--kind", "choice") == DataError.exit_code
    said = capsys.readouterr()
    assert "missing-answer 1" in said.out
    assert "no item can be scored" in said.err


def test_bad_paths_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "no") == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--kind", "music")
