"""Which answers a reader should see side by side: the worst losses, the largest gains, and some drawn by lot."""

import random
from collections.abc import Sequence

from trainer.compare.comparison import SideBySide
from trainer.compare.metrics import metric_of
from trainer.compare.pairing import Pair, finite
from trainer.evaluate.results import ItemScore

MAX_CHARS = 2000  # of a text in the report; the rest is in items.jsonl


def choose_answers(
    pairs: Sequence[Pair], metric: str, items: Sequence[dict[str, ItemScore]], *, count: int, seed: int
) -> list[SideBySide]:
    """At most `count` of each reason, no item twice. `items`: of each candidate, by item_id."""
    sign = metric_of(metric).direction or 1
    gains = [(sign * (pair.difference(metric) or 0.0), pair.base.item_id) for pair in pairs]
    by_gain = sorted(gains, key=lambda entry: (entry[0], entry[1]))
    losses = [item_id for gain, item_id in by_gain if gain < 0][:count]
    wins = [item_id for gain, item_id in reversed(by_gain) if gain > 0][:count]
    taken = {*losses, *wins}
    rest = [item_id for _, item_id in gains if item_id not in taken]
    drawn = random.Random(f"answers {seed} {metric}").sample(rest, min(count, len(rest)))
    chosen = [("loss", losses), ("gain", wins), ("random", drawn)]
    return [_row(item_id, reason, metric, items) for reason, ids in chosen for item_id in ids]


def _row(item_id: str, reason: str, metric: str, items: Sequence[dict[str, ItemScore]]) -> SideBySide:
    first = items[0][item_id]
    found = [candidate.get(item_id) for candidate in items]
    return SideBySide(
        task=first.task,
        item_id=item_id,
        reason=reason,
        prompt=_cut(first.prompt),
        reference=_cut(first.reference),
        answers=tuple("" if item is None else _cut(item.answer) for item in found),
        scores=tuple(None if item is None else finite(item.scores.get(metric)) for item in found),
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
