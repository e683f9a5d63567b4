"""The progress bar of a run, and how fast it goes."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TokenMeter:
    """Non-padding tokens per second of training since the last reading; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.rate = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self._step_began = 0.0
        self._seen = 0

    def begin(self, seen: int) -> None:
        self._seen = seen
        self._step_began = time.perf_counter()

    def end(self, seen: int) -> None:
        self._seconds += time.perf_counter() - self._step_began
        self._tokens += seen - self._seen

    def read(self) -> float:
        self.rate = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        return self.rate


class ProgressBar(TrainerCallback):
    """One bar on stderr: steps, time left, loss, tokens per second."""

    def __init__(self, title: str, meter: TokenMeter) -> None:
        self._title = title
        self._meter = meter
        self._shown: dict[str, str] = {}
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants to be read, not redrawn
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._title,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=interval,
            maxinterval=interval,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        shown = {key: f"{logs[key]:.4g}" for key in ("loss", "eval_loss") if key in logs}
        if shown and self._bar:
            self._shown |= shown  # nan is shown as nan
            self._bar.set_postfix_str(
                ", ".join(f"{key}={text}" for key, text in self._shown.items()) + f", {self._meter.rate:.0f} tokens/s",
                refresh=False,
            )

    def close(self) -> None:
        """Leave the bar as it stands; what is printed next begins a line of its own."""
        if self._bar:
            self._bar.close()
            self._bar = None
