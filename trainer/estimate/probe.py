"""Twenty real steps -> seconds per epoch, hours in all, and the peak that was really reached.

The steps are those of `train`, in a child process and a run folder that is thrown away, so that its peak is its own.
"""

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.store.home import Home
from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.estimate.reserve import GIB
from trainer.options.resolve import Resolved

_CHILD = """
import json, resource, sys
from trainer.__main__ import main
code = main(sys.argv[2:])
peaks = {}
if "trainer.train" in sys.modules:  # or else this process has only started those that train
    import torch
    peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peaks["gpu"] = max(torch.cuda.max_memory_reserved(n) for n in range(torch.cuda.device_count()))
open(sys.argv[1], "w").write(json.dumps(peaks))
sys.exit(code)
"""
_OURS = {"resume": "never", "logging_steps": 1, "plot_loss": False, "disable_tqdm": True}
# They need checkpoints or an engine, or write texts: none of it is the time or the memory of a step.
_LEFT_OUT = ("load_best_model_at_end", "early_stopping_patience", "eval_tasks", "eval_task_limit", "sample_prompts")


@dataclass(frozen=True)
class Probe:
    """`step_s`: seconds of a step once it runs. `peak_bytes`: of the process, on a GPU of torch's allocator; None where
    torchrun started the processes that trained."""

    steps: int
    step_s: float
    steps_per_epoch: int
    steps_in_all: int
    peak_bytes: int | None
    on_gpu: bool

    @property
    def epoch_s(self) -> float:
        return self.step_s * self.steps_per_epoch

    @property
    def hours(self) -> float:
        return self.step_s * self.steps_in_all / 3600

    def lines(self, estimated: int | None) -> Iterator[str]:
        yield (
            f"measured in {self.steps} steps: {self.step_s:.2f} s per step, {self.epoch_s:,.0f} s per epoch "
            f"({self.steps_per_epoch:,} steps), {self.hours:.2f} hours in all ({self.steps_in_all:,} steps)"
        )
        if self.peak_bytes is None:
            yield "peak: not measured with several processes, nor with deepspeed or fsdp"
            return
        beside = f", estimated {estimated / GIB:.2f} GiB ({estimated / self.peak_bytes - 1:+.0%})" if estimated else ""
        yield f"measured peak: {self.peak_bytes / GIB:.2f} GiB{beside}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "epoch_s": self.epoch_s, "hours": self.hours}


def probe(resolved: Resolved, steps: int, home: Home) -> Probe:
    """Run `steps` steps of the configuration. Raises TrainerError with the run's own complaint."""
    with tempfile.TemporaryDirectory(prefix="estimate-") as folder:
        file, run, peaks = (Path(folder) / name for name in ("probe.json", "run", "peaks.json"))
        file.write_text(json.dumps(short_run(resolved, steps, run)), encoding="utf-8")
        arguments = [sys.executable, "-c", _CHILD, str(peaks), "train", "--home", str(home.path), str(file)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise ProbeFailed(done.returncode, (done.stderr.strip().splitlines() or ["no message"])[-1])
        return _read(run, json.loads(peaks.read_text()), resolved.config)


def short_run(resolved: Resolved, steps: int, run: Path) -> dict[str, Any]:
    """The options of a configuration file for `steps` steps in the folder `run`: what was given, and ours over it.

    Defaults are left to `train`, which refuses options that somebody set and this run would not read.
    """
    config = resolved.config
    left_out = set(_LEFT_OUT)
    if not (config.val_file or config.val_size):
        left_out.add("eval_strategy")  # it may have been that of eval_tasks alone
    given = {
        name: value
        for name, value in asdict(config).items()
        if resolved.sources[name] != "default" and name not in left_out
    }
    saving = {} if config.stage == "ppo" else {"save_strategy": "no"}  # ppo keeps no checkpoints, and refuses it
    return {**given, **_OURS, **saving, "max_steps": steps, "output_dir": str(run)}


class ProbeFailed(TrainerError):
    """The short run ended with `code`, which is also how this command ends."""

    def __init__(self, code: int, message: str) -> None:
        self.exit_code = code  # type: ignore[misc]
        super().__init__(f"the short run failed: {re.sub('^error: ', '', message)}")


def _read(run: Path, peaks: dict[str, int], config: TrainConfig) -> Probe:
    """The median step, without the first two: kernels are compiled and memory is taken there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [line for line in lines if "loss" in line and line.get("epoch")]
    last = points[-1]
    per_epoch = max(1, round(last["step"] / last["epoch"]))
    return Probe(
        steps=last["step"],
        step_s=statistics.median(_seconds(points)[2:] or _seconds(points)),
        steps_per_epoch=per_epoch,
        steps_in_all=config.max_steps if config.max_steps > 0 else math.ceil(per_epoch * config.num_train_epochs),
        peak_bytes=peaks.get("gpu") or peaks.get("host"),
        on_gpu=bool(peaks.get("gpu")),
    )


def _seconds(points: list[dict[str, Any]]) -> list[float]:
    """Of each step: its tokens by its tokens per second."""
    tokens = [0, *(line["tokens"] for line in points)]
    gains = [later - earlier for earlier, later in itertools.pairwise(tokens)]
    return [gain / line["tokens_per_second"] for gain, line in zip(gains, points, strict=True)]
