"""`python -m trainer eval` from the command line to the finished folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.store.home import Home
from tests.services import ROOT
from trainer.__main__ import main
from trainer.evaluate.eval_folder import read_result

ROWS = "".join(f"What is {n}?,one,two,three,four,{'ABCD'[n % 4]}\n" for n in range(12))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "law_test.csv"
    path.write_text(ROWS)
    return path


def _eval(*words: str, home: Home) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "trainer", "eval", *words, "--home", str(home.path), "--engine", "fake", "--quiet"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QLOOP_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110, env=environment)


@pytest.mark.e2e
def test_from_name_to_table_and_not_twice(fake_model: Path, questions: Path, home: Home) -> None:
    words = (str(fake_model), "--task", f"choice={questions}", "--task", "identity=Fake", "--max-tokens", "8")
    done = _eval(*words, home=home)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    result = read_result(folder)
    assert folder.parent == home.path / "evals"
    assert [(task.task.partition("/")[0], task.num_scored) for task in result.tasks] == [
        ("choice", 12),
        ("identity", 20),
    ]
    assert "choice/" in done.stdout and "95 %" in done.stdout and "items/s" in done.stdout
    assert len((folder / "items.jsonl").read_text().splitlines()) == 32
    again = _eval(*words, home=home)
    assert again.returncode == 0 and "evaluated already" in again.stderr
    assert read_result(folder) == result


@pytest.mark.slow
@pytest.mark.e2e
def test_a_folder_of_another_evaluation_is_refused(
    fake_model: Path, questions: Path, home: Home, tmp_path: Path
) -> None:
    words = (str(fake_model), "--task", str(questions), "--output", str(tmp_path / "out"))
    assert _eval(*words, home=home).returncode == 0
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["settings"]["shots"] == 0
    refused = _eval(*words, "--shots", "1", home=home)
    assert refused.returncode == 4 and "settings.shots: 0, now 1" in refused.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nobody", "--task", "choice=/nowhere"], 2, "/nowhere"),
        (["nobody", "--task", "chioce=x"], 2, "no kind of task"),
        (["nobody", "--task", "safety"], 2, "no such folder"),
        (["http://127.0.0.1:9/v1#m", "--task", "identity="], 2, "missing"),
        (["http://127.0.0.1:9/v1#m", "--task", "safety", "--dtype", "fp32"], 2, "--dtype: is for an engine of our own"),
        (["http://host:port/v1#model", "--task", "safety"], 2, "http://host:port/v1#model: is no server's URL (Port"),
        (["http:///v1", "--task", "safety"], 2, "http:///v1: is no server's URL (no host"),
        (["nobody", "--task", "safety", "--concurrency", "2"], 2, "--concurrency: is for a URL"),
        (["nobody", "--task", "safety", "--temperature", "nan"], 2, "0 to 2 is expected"),
    ],
)
def test_what_cannot_be_evaluated_ends_at_once(
    words: list[str], code: int, says: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words, "--home", str(home.path)]) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "b", "--concurrency", "4"], "--concurrency: is for a URL"),
        (["a", "b", "--tokenizer", "folder"], "--tokenizer: is for a URL"),
        (["http://127.0.0.1:9/v1#m", "https://127.0.0.1:9/v1#m", "--dtype", "fp32"], "--dtype: is for an engine"),
        (["http://127.0.0.1:9/v1#m", "http://host:port/v1#m"], "http://host:port/v1#m: is no server's URL"),
    ],
)
def test_compare_refuses_at_once_what_cannot_be_asked(
    words: list[str], says: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words, "--task", "safety", "--home", str(home.path)]) == 2
    assert says in capsys.readouterr().err


def test_help_names_every_kind_of_task(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.evaluate.tasks.make import KINDS

    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {kind}" in text for kind in KINDS)
