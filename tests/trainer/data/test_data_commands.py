"""What holds for every data command: help is instant and shows how to call it; memory does not follow the data."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import ROOT, clean_environment
from trainer.__main__ import _parser, main

ACTIONS = ("clean", "dedup", "leak", "stats", "split", "sample", "identity", "label", "augment")
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "openai", "peft", "tokenizers"}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, trainer.__main__ as m; m._parser(); print(*{name.partition('.')[0] for name in sys.modules})"
    assert HEAVY.isdisjoint(run(code).split())


@pytest.mark.parametrize("action", ACTIONS)
def test_help_has_examples_that_parse(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", action, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = re.findall(r"^  python -m trainer (data .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert _parser().parse_args(shlex.split(example)).action == action


@pytest.mark.parametrize("action", ["clean", "dedup", "sample", "split"])
def test_a_missing_file_is_named_and_nothing_is_written(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"sample": ["-n", "1"], "split": ["--size", "0.5"]}.get(action, [])
    assert main(["data", action, str(tmp_path / "no.jsonl"), *more, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "no.jsonl: cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


NEVER_OVER_AN_INPUT = {
    "check": (["--ledger", "{here}/a.jsonl"], "a.jsonl"),
    "convert": (["--to", "text", "--output", "{here}/a.jsonl"], "a.jsonl"),
    "stats": (["--output", "{here}/a.jsonl"], "a.jsonl"),
    "stats-plot": (["--plot", "{here}", "--label-field", "label"], "labels.csv"),
    "split": (["--size", "1", "--output", "{here}"], "split.rejects.jsonl"),
    "identity": (["--name", "n", "--author", "a", "--held-out", "1", "--output", "{here}/b"], "b.held-out.jsonl"),
}


@pytest.mark.parametrize("case", NEVER_OVER_AN_INPUT)
def test_no_command_writes_over_what_it_reads(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, name = NEVER_OVER_AN_INPUT[case]
    source = tmp_path / name
    text = "".join(json.dumps({"question": f"q {n}", "answer": "a", "label": "x"}) + "\n" for n in range(4))
    source.write_text(text)
    command = ["data", case.partition("-")[0], str(source), *(word.format(here=tmp_path) for word in words)]
    assert main(command) == 2
    assert f"would overwrite the input {source}" in capsys.readouterr().err
    assert source.read_text() == text and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("action", ["clean", "convert", "stats"])
def test_an_output_that_is_a_folder_is_refused_before_the_work(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "out").mkdir()
    more = ["--to", "text"] if action == "convert" else []
    assert main(["data", action, str(tmp_path / "a.jsonl"), *more, "--output", str(tmp_path / "out")]) == 2
    assert "out: is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "kib_per_row"), [("clean", 0.25), ("dedup", 1.7)])
def test_memory_does_not_follow_the_data(action: str, kib_per_row: float, tmp_path: Path) -> None:
    """Peak memory for 60,000 rows against that for 6,000. As Python objects one row takes some 2.5 KiB."""
    peaks = {}
    for num_rows in (6_000, 60_000):
        file = tmp_path / f"{num_rows}.jsonl"
        write_rows(file, num_rows)
        command = ["data", action, str(file), "--output", str(tmp_path / "out.jsonl")]
        code = (
            f"import resource, trainer.__main__ as m; assert m.main({command!r}) == 0; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks[num_rows] = int(run(code).split()[-1])  # KiB
    assert (peaks[60_000] - peaks[6_000]) / 54_000 < kib_per_row


def write_rows(file: Path, num_rows: int) -> None:
    draw = random.Random(num_rows)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(num_rows):
            text = "".join(draw.choices(letters, k=200))
            out.write(json.dumps({"instruction": text[:60], "output": text[60:]}, ensure_ascii=False) + "\n")
