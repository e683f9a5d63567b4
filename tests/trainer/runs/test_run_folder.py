"""A run's folder says how the run goes, whoever asks and however it ended."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import ConfigError
from trainer.runs.run_folder import RunFolder, list_runs, read_lines, read_run, run_state

HOLD = """
import sys
from collections.abc import Iterator
from pathlib import Path
from trainer.runs.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.lock()
run.start()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "r1")
    folder.lock()
    folder.start(config={"stage": "sft"})
    yield folder
    folder.unlock()


def test_a_run_tells_its_state(run: RunFolder) -> None:
    record = read_run(run.path)
    assert (record["id"], record["state"], record["pid"]) == ("r1", "running", os.getpid())
    assert run_state(record) == "running"
    run.finish("failed", error="x")
    assert (read_run(run.path)["state"], read_run(run.path)["error"]) == ("failed", "x")
    reopened = RunFolder(run.path)
    reopened.start()
    record = read_run(run.path)
    assert record["state"] == "running" and "error" not in record and "ended" not in record
    assert record["config"] == {"stage": "sft"}, "what was known stays known"
    assert [event["event"] for event in read_lines(run.path / "events.jsonl")] == ["failed"]


def test_a_run_whose_process_is_gone_counts_as_killed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    assert run_state(read_run(path)) == "running"
    with pytest.raises(ConfigError, match=f"run r is being trained by process {child.pid}"):
        RunFolder(path).lock()
    child.kill()
    child.communicate()
    assert read_run(path)["state"] == "running" and run_state(read_run(path)) == "killed"
    again = RunFolder(path)
    again.lock()  # the lock died with its process
    again.unlock()


def test_a_pid_that_another_process_has_got_is_not_the_run(run: RunFolder) -> None:
    record = read_run(run.path)
    assert run_state({**record, "pid_started": record["pid_started"] - 1}) == "killed"
    assert run_state({**record, "pid": None}) == "killed"


def test_numbers_that_are_none_are_written_as_what_they_are(run: RunFolder) -> None:
    run.append_metrics({"step": 1, "loss": math.nan, "grad_norm": -math.inf})
    text = (run.path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": "nan", "grad_norm": "-inf"}


def test_what_comes_after_a_checkpoint_is_forgotten_and_torn_lines_go(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1.0})
        run.append_sample({"step": step, "prompt": "问", "answer": "答"})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.append_event("checkpoint saved", step=3)
    run.forget_after(2)
    assert [line["step"] for line in read_lines(run.path / "metrics.jsonl")] == [1, 2]
    assert '"问"' in (run.path / "samples.jsonl").read_text(encoding="utf-8")
    run.append_metrics({"step": 3, "loss": 0.5})
    assert [line["step"] for line in read_lines(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_lines(run.path / "events.jsonl")) == 1, "events are history: they stay"


def test_other_processes_of_a_run_write_nothing(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "r", writes=False)
    other.start(config={})
    other.append_metrics({"step": 1})
    other.append_event("x")
    other.finish("done")
    other.forget_after(0)
    assert not other.path.exists()


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    for name, started in (("b", 1), ("a", 2)):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.record(id=name, started=started, state="done")
    (tmp_path / "no-run").mkdir()
    assert [record["id"] for record in list_runs(tmp_path)] == ["b", "a"]
    with pytest.raises(ConfigError, match=r"no run\.json"):
        read_run(tmp_path / "no-run")


def test_answers_with_unusual_line_ends_stay_one_line(run: RunFolder) -> None:
    """JSON lets U+2028 and U+0085 stand in a text; taken for line ends, they would tear the line at the next resume."""
    run.append_sample({"step": 1, "answer": "a\u2028b\x85c"})
    run.forget_after(1)
    assert read_lines(run.path / "samples.jsonl") == [{"step": 1, "answer": "a\u2028b\x85c"}]
