"""Curves come from metrics.jsonl alone, so they can be drawn after any exit."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.runs.curves import read_curves, redraw
from trainer.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "r1")
    folder.path.mkdir()
    folder.record(id="r1", state="failed")
    return folder


def metrics(run: RunFolder, *lines: dict[str, Any]) -> None:
    for line in lines:
        run.append_metrics(line)


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def test_train_and_eval_of_a_step_share_a_row(run: RunFolder) -> None:
    metrics(
        run,
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.5, "tokens": 10, "epoch": 0.5},
        {"step": 2, "loss": 1.0, "learning_rate": 0.05, "grad_norm": 1.0, "tokens": 20, "epoch": 1.0},
        {"step": 2, "eval_loss": 1.5, "perplexity": 4.5, "epoch": 1.0},
    )
    assert redraw(run.path) == run.path / "curves.png"
    with (run.path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows] == [("1", "2.0", ""), ("2", "1.0", "1.5")]
    assert (rows[1]["perplexity"], rows[1]["learning_rate"], rows[1]["grad_norm"]) == ("4.5", "0.05", "1.0")
    assert read_curves(run.path)[1]["eval_loss"] == 1.5
    assert min(size_of(run.path / "curves.png")) >= 600
    assert [path.name for path in run.path.glob(".*part")] == []


def test_tasks_have_columns_and_panels_of_their_own(run: RunFolder) -> None:
    metrics(run, {"step": 1, "loss": 2.0})
    redraw(run.path)
    _, without = size_of(run.path / "curves.png")
    metrics(run, {"step": 1, "choice/mmlu/accuracy": 0.25, "identity/passed": 0.5, "choice/law/accuracy": 0.75})
    redraw(run.path)
    with (run.path / "curves.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["loss"], row["choice/mmlu/accuracy"], row["identity/passed"]) == ("2.0", "0.25", "0.5")
    assert size_of(run.path / "curves.png")[1] == without * 3 // 2, "one more row for two more metrics"


def test_what_is_not_a_number_stays_so_and_is_drawn(run: RunFolder) -> None:
    metrics(run, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan, "grad_norm": math.inf})
    blank = RunFolder(run.path.parent / "r2")
    blank.path.mkdir()
    blank.record(id="r1", state="failed")
    metrics(blank, {"step": 1, "loss": 2.0})
    assert (run.path / "curves.png") != redraw(blank.path)
    redraw(run.path)
    assert (run.path / "curves.csv").read_text().splitlines()[2].split(",")[2] == "nan"
    assert "0.0" not in (run.path / "curves.csv").read_text().splitlines()[2]
    assert (run.path / "curves.png").read_bytes() != (blank.path / "curves.png").read_bytes(), "the NaN is to be seen"


@pytest.mark.parametrize("text", ["", '{"step": 1, "lo', "\n[1]\n"])
def test_a_run_without_a_whole_line_has_curves_too(run: RunFolder, text: str) -> None:
    (run.path / "metrics.jsonl").write_text(text)
    redraw(run.path)
    assert size_of(run.path / "curves.png")[0] > 0
    assert (run.path / "curves.csv").read_text().startswith("step,epoch,loss,eval_loss,perplexity,learning_rate")


def test_no_run_no_curves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run\.json"):
        redraw(tmp_path)
