"""Texts -> numbers by which equal and similar texts are found. Knows nothing about rows or files.

Equal: a 64-bit hash. Similar: MinHash signatures (Broder 1997, "On the resemblance and containment of documents") over
character n-grams, cut into bands (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3): texts that
share a band are candidates. Written with numpy in batches: 21 numbers stay per text, where an index of Python objects
keeps some 4 KiB.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_PERMUTATIONS = 128
RECALL = 0.99  # share of the pairs exactly at the threshold that share a band
# A Chinese word has two characters, an English one five: similar texts share about as many grams in both.
GRAM_CJK = 3
GRAM_OTHER = 5

_CJK_START, _CJK_END = 0x2E80, 0xD7FF  # CJK radicals to Hangul: scripts whose characters are syllables or words
_MIX = tuple(np.uint32(odd) for odd in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1))

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `num_bands` bands of `width` numbers."""

    num_bands: int
    width: int

    @classmethod
    def for_threshold(cls, threshold: float) -> "Bands":
        """The widest bands, so the fewest false candidates, that still find RECALL of the pairs at the threshold."""
        for width in range(NUM_PERMUTATIONS, 0, -1):
            num_bands = NUM_PERMUTATIONS // width
            if 1 - (1 - threshold**width) ** num_bands >= RECALL:
                return cls(num_bands, width)
        return cls(NUM_PERMUTATIONS, 1)


def text_hash(text: str) -> int:
    """64 bits. Two of a million different texts meet with a probability of 3 in 100 million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def grams(text: str) -> U32:
    """Hashes of the text's character n-grams, each once, sorted."""
    return np.unique(_gram_hashes(_characters([text]))[: len(text)])


def similarity(one: U32, other: U32) -> float:
    """Jaccard similarity of two sets of grams: shared by all."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def band_hashes(texts: Sequence[str], bands: Bands, seed: int = 1) -> U64:
    """[texts, bands]: one number per text and band; similar texts have equal ones. An empty text is like nothing."""
    hashes = _gram_hashes(_characters(texts))
    lengths = np.array([len(text) for text in texts])
    starts = np.concatenate([[0], np.cumsum(lengths + GRAM_OTHER - 1)[:-1]])
    # reduceat takes begin and end of each text in turn; what lies between two texts is thrown away.
    edges = np.stack([starts, starts + np.maximum(lengths, 1)], axis=1).reshape(-1)
    draw = np.random.default_rng(seed)
    factors = draw.integers(0, 2**32, NUM_PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
    terms = draw.integers(0, 2**32, NUM_PERMUTATIONS, dtype=np.uint32)
    result = np.empty((len(texts), bands.num_bands), np.uint64)
    permuted = np.empty_like(hashes)
    for band in range(bands.num_bands):
        mixed = np.full(len(texts), 0xCBF29CE484222325, np.uint64)
        for p in range(band * bands.width, (band + 1) * bands.width):
            # An odd factor makes this a bijection of 32-bit numbers, so no two grams fall together.
            np.multiply(hashes, factors[p], out=permuted)
            permuted += terms[p]
            mixed = (mixed ^ np.minimum.reduceat(permuted, edges)[::2]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        result[:, band] = mixed
    empty = np.flatnonzero(lengths == 0)
    result[empty] = draw.integers(0, 2**63, (len(empty), bands.num_bands), dtype=np.uint64)
    return result


def _characters(texts: Sequence[str]) -> U32:
    """Code points of all texts, each text followed by as many zeros as its last gram reaches over."""
    end = "\0" * (GRAM_OTHER - 1)
    joined = end.join(texts) + end + "\0\0"  # two more, so that every end is an index, an empty text's too
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _gram_hashes(characters: U32) -> U32:
    """One hash per position, of the gram that begins there; the last few positions have none of their own."""
    count = len(characters) - GRAM_OTHER + 1
    mixed = np.zeros(count, np.uint32)
    first = characters[:count]
    is_cjk = (first >= _CJK_START) & (first <= _CJK_END)
    for offset in range(GRAM_OTHER):
        step = (mixed ^ characters[offset : offset + count]) * _MIX[offset]
        mixed = step if offset < GRAM_CJK else np.where(is_cjk, mixed, step)
        mixed ^= mixed >> np.uint32(15)
    return _finalised(mixed)


def _finalised(hashes: U32) -> U32:
    """MurmurHash3's finalizer: every bit of the input moves every bit of the output."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(factor)
    return hashes ^ (hashes >> np.uint32(16))
