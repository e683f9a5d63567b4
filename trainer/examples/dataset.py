"""A run's rows -> examples to train and to validate on, and the ledger of what became of every row.

Knows the options that choose rows; the labels are made by whoever it is given. No tensors, no model.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.store.hashes import file_hash, text_hash
from trainer.config import TrainConfig
from trainer.data.files import select
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Row
from trainer.errors import DataError
from trainer.ledger import Ledger

T = TypeVar("T")
LabelRow = Callable[[Row], Iterable[T | LedgerLine]]


@dataclass(frozen=True)
class Rows(Generic[T]):
    """What the rows of some files became; one row may have become several items."""

    items: list[list[T]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def flat(self, chosen: Sequence[int] | None = None) -> Iterator[T]:
        numbers = range(len(self.items)) if chosen is None else chosen
        return (item for number in numbers for item in self.items[number])


@dataclass(frozen=True)
class TrainingData(Generic[T]):
    """`num_replayed` of the training rows come from replay_file."""

    train: list[T]
    validation: list[T]
    num_rows: int
    num_replayed: int = 0


def load_data(config: TrainConfig, label: LabelRow[T], ledger: Ledger) -> TrainingData[T]:
    """Read, label, hold out and mix. Raises DataError when too few rows are left or too many were refused."""
    rows = _read("train_file", config, label, ledger)
    replay = _read("replay_file", config, label, ledger)
    validation = list(_read("val_file", config, label, ledger).flat())
    ledger.check_ratio(config.max_reject_ratio)
    for name, found in (("train_file", rows), ("replay_file", replay), ("val_file", validation)):
        if getattr(config, name) and not found:
            raise DataError(f"{name}: none of its rows can be used; rejects.jsonl of the run names each")
    held_out = _held_out(len(rows), config)
    kept = [number for number in range(len(rows)) if number not in held_out]
    if not kept:
        raise DataError(f"val_size={config.val_size:g} holds out all {len(rows)} rows; make it smaller")
    replayed = _replayed(len(kept), len(replay), config)
    return TrainingData(
        [*rows.flat(kept), *replay.flat(replayed)],
        [*validation, *rows.flat(sorted(held_out))],
        len(kept) + len(replayed),
        len(replayed),
    )


def dataset_hash(config: TrainConfig) -> str:
    """sha256 over the contents of all files the run reads, and over how much of each it takes."""
    parts = [] if config.max_samples is None else [f"of each file {config.max_samples}"]
    for paths in (config.train_file, config.val_file, config.replay_file):
        for selection in select(paths):
            parts += [f"{file_hash(file)}#{selection.limit or ''}" for file in selection.files]
        parts.append("")
    return text_hash("\n".join(parts))


def _read(name: str, config: TrainConfig, label: LabelRow[T], ledger: Ledger) -> Rows[T]:
    """The rows of the option `name`; none where it is unset."""
    paths: tuple[str, ...] = getattr(config, name)
    rows: Rows[T] = Rows()
    for row in ledger.take(read_rows(paths, config.stage, most_per_file=config.max_samples)):
        made: list[T] = []
        for item in label(row):
            if isinstance(item, LedgerLine):
                ledger.add(item)
            else:
                made.append(item)
        if made:
            rows.items.append(made)
    return rows


def _held_out(num_rows: int, config: TrainConfig) -> set[int]:
    """The rows of val_size: a share, or a number. The same for the same seed and number of rows."""
    size = config.val_size
    num = min(num_rows, round(num_rows * size) if size < 1 else int(size))
    if size and not num:
        num = 1
    return set(random.Random(f"validation {config.seed}").sample(range(num_rows), num))


def _replayed(num_kept: int, num_replay: int, config: TrainConfig) -> list[int]:
    """So many of the replay rows that they are replay_ratio of all; fewer if there are not so many."""
    wanted = round(num_kept * config.replay_ratio / (1 - config.replay_ratio))
    num = min(num_replay, wanted)
    return sorted(random.Random(f"replay {config.seed}").sample(range(num_replay), num))
