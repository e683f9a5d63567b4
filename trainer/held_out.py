"""The rows that a run held out of its training, found again from its record: the same files, the same draw."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.hashes import write_text
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.data.rows import LedgerLine, Row
from trainer.errors import DataError
from trainer.examples.dataset import dataset_hash, load_data
from trainer.examples.labels import label, labels_of
from trainer.examples.sequences import Example
from trainer.ledger import Ledger

MAX_ROWS = 200


def write_held_out(record: Mapping[str, Any], base: Path, target: Path) -> int:
    """Write at most MAX_ROWS of the rows that the run of this record validated on; how many. 0: it held none out.

    Raises DataError when the run's data are gone or have changed since.
    """
    config = _config(record)
    if config.stage not in ("sft", "pt") or not (config.val_size or config.val_file):
        return 0
    try:
        if record.get("dataset_hash") and dataset_hash(config) != record["dataset_hash"]:
            raise DataError("the run's data files have changed since, so its held-out rows are not known")
        rows = list(_rows(config, base))[:MAX_ROWS]
    except ConfigError as error:
        raise DataError(f"the run's data cannot be read again: {error}") from None
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _rows(config: TrainConfig, base: Path) -> Iterator[dict[str, Any]]:
    labels = labels_of(config, base, ChatRenderer.load(base))

    def usable(row: Row) -> Iterator[Row | LedgerLine]:
        """The row itself where training made an example of it: so the draw has the same rows to draw from."""
        if any(isinstance(item, Example) for item in label(row, labels)):
            yield row

    for row in load_data(config, usable, Ledger(None)).validation:
        if row.text:
            yield {"text": row.text}
        elif not row.tools and not any(message.get("tool_calls") for message in row.messages):
            yield {"messages": [{"role": one["role"], "content": one["content"]} for one in row.messages]}


def _config(record: Mapping[str, Any]) -> TrainConfig:
    """As run.json has it: lists are tuples again."""
    known = {one.name for one in dataclasses.fields(TrainConfig)}
    values: dict[str, Any] = {name: value for name, value in (record.get("config") or {}).items() if name in known}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return TrainConfig(**values)
