"""Rows that say the same as an earlier row, exactly or nearly. Knows texts by number; knows no files.

A pair is near when the Jaccard similarity of its character n-grams is at least the threshold. Candidates come from
`fingerprint`'s bands; each is then measured exactly, so a row is never called a duplicate by chance.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.fingerprint import U32, U64, Bands, band_hashes, grams, similarity, text_hash

BATCH = 512
# A bound on the work where many rows share most of their text (forms, templates) and none is a duplicate.
MAX_MEASURED = 16  # candidates measured per row, those that share most bands first
MAX_PER_BAND = 64  # rows that one band remembers


@dataclass(frozen=True)
class Duplicate:
    """Row `number` repeats row `of`; `similarity` is 1.0 for the same text."""

    number: int
    of: int
    similarity: float
    is_exact: bool


class Fingerprints:
    """What is remembered of every text: 8 bytes, and 8 more per band when near duplicates are wanted too."""

    def __init__(self, threshold: float | None) -> None:
        """`threshold`: Jaccard similarity from which on a pair is near, in (0, 1]; None finds equal texts only."""
        self.threshold = threshold
        self._bands = None if threshold is None else Bands.for_threshold(threshold)
        self._hashes: list[U64] = []
        self._band_hashes: list[U64] = []
        self._waiting: list[str] = []

    def add(self, text: str) -> None:
        """Texts are numbered from 0 in the order of their coming; they come normalised."""
        self._waiting.append(text)
        if len(self._waiting) == BATCH:
            self._flush()

    def hashes(self) -> U64:
        """[texts]: one hash per text."""
        self._flush()
        return np.concatenate(self._hashes) if self._hashes else np.empty(0, np.uint64)

    def buckets(self) -> NDArray[np.int32]:
        """[texts, bands]: a number shared by the texts whose band is equal; -1 where no other text shares it."""
        self._flush()
        if not self._band_hashes:
            return np.empty((len(self.hashes()), 0), np.int32)
        columns = np.concatenate(self._band_hashes).T
        self._band_hashes = []
        return np.stack([_shared(np.ascontiguousarray(column)) for column in columns], axis=1)

    def _flush(self) -> None:
        if self._waiting:
            self._hashes.append(np.array([text_hash(text) for text in self._waiting], np.uint64))
            if self._bands:
                self._band_hashes.append(band_hashes(self._waiting, self._bands))
            self._waiting = []


def find_duplicates(
    fingerprints: Fingerprints,
    read_text: Callable[[int], str],
    *,
    references: int | None = None,
    against_all: bool = False,
) -> Iterator[Duplicate]:
    """Every text that repeats an earlier one, in order, each once.

    A text is compared with those that are kept: the first of its kind. `references`: only the first so many texts are
    compared with, and only the others are judged. `against_all`: with every earlier text, duplicate or not.
    `read_text` gives a text by its number once more.
    """
    firsts = _firsts(fingerprints.hashes()).tolist()
    index = _Index(fingerprints.buckets(), read_text, fingerprints.threshold or 1.0)
    for number, first in enumerate(firsts):
        if references is not None and number < references:
            if first == number:
                index.add(number)
            continue
        if first < (number if references is None else references):
            found: Duplicate | None = Duplicate(number, first, 1.0, True)
        else:
            found = index.nearest(number)
        if found:
            yield found
        if references is None and (against_all or not found):
            index.add(number)


class _Index:
    def __init__(self, buckets: NDArray[np.int32], read_text: Callable[[int], str], threshold: float) -> None:
        self._buckets = buckets
        self._threshold = threshold
        self._members: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._grams: Callable[[int], U32] = lru_cache(4096)(lambda number: grams(read_text(number)))

    def nearest(self, number: int) -> Duplicate | None:
        """The most similar remembered text at or over the threshold."""
        shared = Counter(other for key in self._keys(number) for other in self._members.get(key, ()))
        best: Duplicate | None = None
        for other, _ in shared.most_common(MAX_MEASURED):
            measured = similarity(self._grams(number), self._grams(other))
            if measured >= self._threshold and (best is None or measured > best.similarity):
                best = Duplicate(number, other, measured, False)
        return best

    def add(self, number: int) -> None:
        for key in self._keys(number):
            members = self._members[key]
            if len(members) < MAX_PER_BAND:
                members.append(number)

    def _keys(self, number: int) -> Iterable[tuple[int, int]]:
        row = self._buckets[number]
        return ((int(band), int(row[band])) for band in np.flatnonzero(row >= 0))


def _firsts(hashes: U64) -> NDArray[np.int64]:
    """[texts]: number of the first text with the same hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse] if len(hashes) else np.empty(0, np.int64)


def _shared(column: U64) -> NDArray[np.int32]:
    _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
    return np.where(counts[inverse] > 1, inverse, -1).astype(np.int32)
