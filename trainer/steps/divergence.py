"""A Trainer that stops at the first loss or gradient that is no number, before it reaches the weights.

What its optimizer or schedule refuses is the configuration's fault.

Every batch holds `rows`, the numbers of its rows, so that the error can name them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from server.errors import ConfigError
from trainer.errors import Diverged, first_line

SHOWN_LINES = 40  # of the rows in an error message

Place = tuple[str, int]  # file and line


class StrictTrainer(Trainer):
    """`places[n]` says where row n stands. Raises Diverged and ConfigError."""

    places: Sequence[Place] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step_rows: list[int] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with _told_as(f"optim={OptimizerNames(self.args.optim).value}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with _told_as(f"lr_scheduler_type={SchedulerType(self.args.lr_scheduler_type).value}"):
            return super().create_scheduler(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rows = inputs.pop("rows").tolist()
        self._step_rows += rows
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        # With several ranks the gradient carries the news to all of them.
        if self.args.world_size == 1 and not torch.isfinite(loss):
            self._stop("loss", float(loss), rows)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("rows", None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # fp16 finds its loss scale by overflowing; such steps are skipped.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._stop("gradient", float(norm), self._step_rows)
        self._step_rows = []
        return norm

    def _stop(self, what: str, value: float, rows: list[int]) -> NoReturn:
        if self.args.world_size > 1:
            found: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(found, rows)
            rows = [row for part in found for row in part]
        raise Diverged(
            f"the {what} is {value} in step {self.state.global_step + 1}, which is not applied. Its rows: "
            f"{named(self._place(row) for row in rows)}. Look at them, lower learning_rate"
            + (", or use bf16=false fp16=false" if self.args.bf16 or self.args.fp16 else "")
        )

    def _place(self, row: int) -> Place:
        return self.places[row]


@contextmanager
def _told_as(option: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"{option}: transformers refuses it: {first_line(error)}") from error


def named(places: Iterable[Place]) -> str:
    """`a.jsonl:3, 9, 12; b.jsonl:1`."""
    lines: dict[str, set[int]] = defaultdict(set)
    for source, line in places:
        lines[source].add(line)
    shown, left = [], SHOWN_LINES
    for source, numbers in lines.items():
        first = sorted(numbers)[:left]
        left -= len(first)
        more = f" and {len(numbers) - len(first)} more" if len(first) < len(numbers) else ""
        shown.append(f"{source}:{', '.join(map(str, first))}{more}")
    return "; ".join(shown)
