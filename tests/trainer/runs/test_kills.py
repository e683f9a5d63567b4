"""Kill a run anywhere: the same command goes on, and its adapter is, bit for bit, that of an undisturbed run."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.runs.checkpoints import checkpoint_folders, is_sealed
from trainer.runs.curves import redraw
from trainer.runs.run_folder import read_lines, read_run, run_state

DEADLINE_S = 300.0  # of one process, on a machine with much else to do


class Command:
    """One `python -m trainer train` on a tiny model, as often as it takes."""

    def __init__(self, model: Path, home: Path, num_rows: int, run_id: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        data = home / "chat.jsonl"
        rows = [{"instruction": f"question {n}", "output": "answer " * (1 + n % 7)} for n in range(num_rows)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.run = home / "runs" / run_id
        options = {
            "model_name_or_path": model,
            "train_file": data,
            "run_id": run_id,
            "val_size": 4,
            "lora_rank": 2,
            "lora_dropout": 0.1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 0.01,
            "max_length": 128,
            "neftune_noise_alpha": 5,
            "eval_steps": 20,
            "save_steps": 3,
            "logging_steps": 2,
            "sample_prompts": "question 1",
        }
        words = [f"{key}={value}" for key, value in options.items()]
        self._words = [sys.executable, "-m", "trainer", "train", "--home", str(home), *words]

    def run_here(self) -> None:
        assert main(self._words[3:]) == 0

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(self._words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def stop(self, number: int, ready: Callable[[], bool], delay_s: float) -> tuple[int, str]:
        """Start it, wait until `ready`, then `delay_s`, then send the signal: exit code and stderr."""
        child = self.start()
        end = time.monotonic() + DEADLINE_S
        while child.poll() is None and not ready() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(delay_s)
        child.send_signal(number)
        _, error = child.communicate(timeout=DEADLINE_S)
        return child.returncode, error

    def newer_than(self, known: set[str]) -> Callable[[], bool]:
        """Whether a checkpoint folder has appeared: it is being written then."""
        return lambda: bool({folder.name for folder in checkpoint_folders(self.run)} - known)

    @property
    def known(self) -> set[str]:
        return {folder.name for folder in checkpoint_folders(self.run)}

    @property
    def adapter(self) -> bytes:
        return (self.run / "adapter" / "adapter_model.safetensors").read_bytes()

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_lines(self.run / "metrics.jsonl") if "loss" in line}


def finish(child: "subprocess.Popen[str]") -> str:
    _, error = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, error
    return error


@pytest.mark.timeout(600)
def test_kill_it_anywhere(tiny_model: Path, tmp_path: Path) -> None:
    """Three kills, two of them while a checkpoint is being written, and a folder torn by hand."""
    whole, killed = (Command(tiny_model, tmp_path / name, 60, "r") for name in ("whole", "killed"))
    whole.run_here()
    for delay_s in (0.0, 0.003, 0.05):
        code, error = killed.stop(signal.SIGKILL, killed.newer_than(killed.known), delay_s)
        assert code == -signal.SIGKILL, error
        assert run_state(read_run(killed.run)) == "killed"
    redraw(killed.run)
    assert (killed.run / "curves.png").stat().st_size > 0, "`plot` draws what a kill has left"
    tear(killed)
    error = finish(killed.start())
    assert "checkpoint-999 is passed over and removed: it has no manifest" in error
    assert "run r goes on from checkpoint-" in error
    assert killed.adapter == whole.adapter
    assert read_run(killed.run)["state"] == "done"
    assert killed.losses() == whole.losses()
    steps = [line["step"] for line in read_lines(killed.run / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps)), "no step is recorded twice"


def tear(command: Command) -> None:
    """A later checkpoint that looks nearly whole."""
    folder = command.run / "checkpoint-999"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"half a file")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_it_anywhere_twenty_times(tiny_model: Path, tmp_path: Path) -> None:
    """At random moments: while it loads, between steps, while a checkpoint is written, sealed or removed."""
    chance = random.Random(1)
    whole, killed = (Command(tiny_model, tmp_path / name, 300, "r") for name in ("whole", "killed"))
    finish(whole.start())
    torn = 0
    for _ in range(20):
        moment = chance.choice(["saving", "saving", "training", "anywhere"])
        seen = len(read_lines(killed.run / "events.jsonl"))
        ready = {
            "saving": killed.newer_than(killed.known),
            "training": lambda seen=seen: len(read_lines(killed.run / "events.jsonl")) > seen + 1,
            "anywhere": lambda: True,
        }[moment]
        delay_s = chance.uniform(0.0, {"saving": 0.04, "training": 0.3, "anywhere": 8.0}[moment])
        # SIGTERM may meet the process before it listens.
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        code, error = killed.stop(number, ready, delay_s)
        assert code in {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number], error
        torn += any(not is_sealed(folder) for folder in checkpoint_folders(killed.run))
    finish(killed.start())
    assert torn > 0, "no kill has met a checkpoint being written"
    assert killed.adapter == whole.adapter
