"""Exactly what a run would be fed: token, id and label of its first rows. Needs the model's texts, not its weights."""

from collections.abc import Iterator

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import resolve_model
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine
from trainer.errors import DataError
from trainer.examples.labels import ChatLabels, TextLabels, label, labels_of
from trainer.examples.sequences import IGNORED, Example

ROW_STAGES = ("pt", "sft")


def inspect(config: TrainConfig, home: Home, count: int) -> Iterator[str]:
    """Lines to print for the first `count` examples. Raises DataError: none; ConfigError: another stage."""
    if config.stage not in ROW_STAGES:
        raise ConfigError(f"inspect shows stages {' and '.join(ROW_STAGES)}; stage={config.stage} has pairs, not rows")
    base = resolve_model(config.model_name_or_path, home, with_weights=False)
    renderer = ChatRenderer.load(base)
    labels = labels_of(config, base, renderer)
    items = _items(config, labels)
    found = 0
    for item in items:
        if isinstance(item, LedgerLine):
            yield f"{item.source}:{item.line}: {item.action}, {item.code}: {item.detail}"
            continue
        yield from _table(item, renderer)
        found += 1
        if found >= count:
            return
    if not found:
        raise DataError(f"no usable row in {', '.join(config.train_file)}; the lines above say why")


def _items(config: TrainConfig, labels: ChatLabels | TextLabels) -> Iterator[Example | LedgerLine]:
    for row in read_rows(config.train_file, config.stage, most_per_file=config.max_samples):
        if isinstance(row, LedgerLine):
            yield row
        else:
            yield from label(row, labels)


def _table(example: Example, renderer: ChatRenderer) -> Iterator[str]:
    learned = sum(one != IGNORED for one in example.labels)
    yield f"{example.origin}: {len(example.token_ids)} tokens, {learned} learned"
    yield f"  {'id':>8}  {'label':>8}  token"
    for token, one in zip(example.token_ids, example.labels, strict=True):
        text = renderer.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
        yield f"  {token:>8}  {one:>8}  {text!r}"
