"""Twenty real steps -> seconds per epoch, hours in all, and the peak that was really reached.

The steps are those of `train`, in a child process and a home that is thrown away, so that its peak is its own.
"""

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.store.home import Home
from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.estimate.reserve import GIB

_CHILD = """
import json, resource, sys
from trainer.__main__ import main
code = main(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
gpu = 0
if "torch" in sys.modules:
    import torch
    if torch.cuda.is_available():
        gpu = max(torch.cuda.max_memory_reserved(n) for n in range(torch.cuda.device_count()))
open(sys.argv[1], "w").write(json.dumps({"host": peak, "gpu": gpu}))
sys.exit(code)
"""
_OURS = ("save_strategy=no", "plot_loss=false", "logging_steps=1", "disable_tqdm=true", "resume=never")


@dataclass(frozen=True)
class Probe:
    """`step_s`: seconds of a step once it runs. `peak_bytes`: of the process, on a GPU of torch's allocator."""

    steps: int
    step_s: float
    steps_per_epoch: int
    steps_in_all: int
    peak_bytes: int
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
        beside = f", estimated {estimated / GIB:.2f} GiB ({estimated / self.peak_bytes - 1:+.0%})" if estimated else ""
        yield f"measured peak: {self.peak_bytes / GIB:.2f} GiB{beside}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "epoch_s": self.epoch_s, "hours": self.hours}


def probe(config: TrainConfig, words: Sequence[str], steps: int, home: Home) -> Probe:
    """Run `steps` steps of the configuration. Raises TrainerError with the run's own complaint."""
    with tempfile.TemporaryDirectory(prefix="estimate-") as folder:
        run, peaks = Path(folder) / "run", Path(folder) / "peaks.json"
        ours = [*_OURS, f"max_steps={steps}", f"output_dir={run}"]
        arguments = [sys.executable, "-c", _CHILD, str(peaks), "train", "--home", str(home.path), *words, *ours]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise ProbeFailed(done.returncode, (done.stderr.strip().splitlines() or ["no message"])[-1])
        return _read(run, json.loads(peaks.read_text()), config)


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
        peak_bytes=peaks["gpu"] or peaks["host"],
        on_gpu=bool(peaks["gpu"]),
    )


def _seconds(points: list[dict[str, Any]]) -> list[float]:
    """Of each step: its tokens by its tokens per second."""
    tokens = [0, *(line["tokens"] for line in points)]
    gains = [later - earlier for earlier, later in itertools.pairwise(tokens)]
    return [gain / line["tokens_per_second"] for gain, line in zip(gains, points, strict=True)]
