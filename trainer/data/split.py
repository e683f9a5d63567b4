"""Train and valid rows such that no valid question can be learnt by heart from train. Knows rows by number.

Rows with the same question, and rows that are near duplicates of one another, form a group; a group is never divided.
Groups are drawn so that every label has its share on both sides.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.errors import ConfigError
from trainer.data.dedup import duplicates
from trainer.data.duplicates import Fingerprints
from trainer.data.rows import Row
from trainer.data.spool import Spool
from trainer.data.stats import check_labels, label_of
from trainer.data.texts import normalised, question_of, text_of


@dataclass(frozen=True)
class Split:
    """Numbers of the valid rows, and what a person should know about the draw."""

    valid: frozenset[int]
    num_rows: int
    num_groups: int
    largest_group: int
    labels: tuple[tuple[str, int, int], ...]  # label, train rows, valid rows


def split(
    rows: Iterable[Row],
    spool: Spool,
    size: float,
    *,
    label_field: str | None = None,
    threshold: float = 0.8,
    seed: int = 42,
) -> Split:
    """Keep `rows` in `spool` and draw the valid ones. `size`: a share when below 1, else a number of rows.

    Raises ConfigError when the size leaves one side empty.
    """
    whole, questions = Fingerprints(threshold), Fingerprints(threshold)
    labels: list[str] = []
    for row in rows:
        spool.add(row)
        whole.add(normalised(text_of(row)))
        questions.add(normalised(question_of(row)))
        labels.append(label_of(row, label_field) if label_field else "")
    if label_field and labels:
        check_labels(labels, label_field)
    wanted = round(size * len(spool)) if size < 1 else int(size)
    if not 0 < wanted < len(spool):
        raise ConfigError(f"size {size:g} of {len(spool)} rows is {wanted}: both sides need a row")
    groups = _Groups(len(spool))
    for pair in duplicates(spool, whole, "row", against_all=True):
        groups.join(pair.number, pair.of)
    for pair in duplicates(spool, questions, "question", against_all=True):
        groups.join(pair.number, pair.of)
    members = groups.members()
    valid = _draw(members, labels, wanted, seed)
    return Split(valid, len(spool), len(members), max(map(len, members)), _by_label(labels, valid))


def _draw(members: Sequence[Sequence[int]], labels: Sequence[str], wanted: int, seed: int) -> frozenset[int]:
    """Groups at random, per label as many rows as its share of `wanted`; a group counts for its first row's label."""
    strata: dict[str, list[Sequence[int]]] = defaultdict(list)
    for group in members:
        strata[labels[group[0]]].append(group)
    draw = random.Random(seed)
    valid: set[int] = set()
    owed = 0.0  # what rounding and undividable groups have left open so far
    for label in sorted(strata, key=lambda name: (-len(strata[name]), name)):
        groups = strata[label]
        draw.shuffle(groups)
        num_rows = sum(map(len, groups))
        owed += wanted * num_rows / len(labels)
        for group in groups:
            if len(group) <= owed + 0.5 and len(valid) + len(group) < len(labels):
                valid.update(group)
                owed -= len(group)
    return frozenset(valid)


def _by_label(labels: Sequence[str], valid: frozenset[int]) -> tuple[tuple[str, int, int], ...]:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for number, label in enumerate(labels):
        counts[label][number in valid] += 1
    return tuple((label, train, held) for label, (train, held) in sorted(counts.items(), key=lambda c: -sum(c[1])))


class _Groups:
    """Union-find: rows that belong together, however indirectly."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self._parents[high] = low

    def members(self) -> list[list[int]]:
        """Every group, in the order of its first row."""
        groups: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self._parents)):
            groups[self._root(number)].append(number)
        return list(groups.values())

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number
