"""BLEU of a whole set of answers, and the counts of each answer that its interval is drawn from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    import numpy as np

_TOKENIZE: Final = "zh"  # sacrebleu's: Chinese characters, and words of other languages
_ORDER: Final = 4


@dataclass(frozen=True, kw_only=True)
class CorpusBleu:
    """`score` is 0 to 1, a hundredth of what sacrebleu prints; `signature` is what to quote beside it."""

    score: float
    signature: str


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusBleu:
    """sacrebleu's BLEU (Post 2018, aclanthology.org/W18-6319): matches and lengths are summed over all answers first.

    references: those of each answer; their number may differ. Raises ValueError where an answer has none.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=_TOKENIZE, force=True)
    # sacrebleu takes None where an answer has fewer references than others; its types do not say so.
    found = metric.corpus_score(list(answers), cast("list[list[str]]", _streams(answers, references)))
    return CorpusBleu(score=found.score / 100, signature=str(metric.get_signature()))


def bleu_counts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """[num_answers, 10]: length, closest reference's length, matches of 1- to 4-grams, number of 1- to 4-grams."""
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU

    _streams(answers, references)
    tokenizer = BLEU(tokenize=_TOKENIZE).tokenizer
    rows = []
    for answer, expected in zip(answers, references, strict=True):
        found = tokenizer(answer.rstrip()).split()
        rows.append(_counts(found, [tokenizer(reference.rstrip()).split() for reference in expected]))
    return np.array(rows, dtype=np.float64).reshape(-1, 2 + 2 * _ORDER)


def bleu_of_counts(counts: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """[sets, 10] sums of `bleu_counts` to [sets] BLEUs, 0 to 1, smoothed as sacrebleu does (`exp`: an order without a
    match counts 1 / (2^k · n-grams), k = 1, 2, …; a set without 4-grams has 0)."""
    import numpy as np

    found, expected = counts[:, 0], counts[:, 1]
    matches, totals = counts[:, 2 : 2 + _ORDER], counts[:, 2 + _ORDER :]
    misses = np.cumsum(matches == 0, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches == 0, 0.5**misses, matches) / totals
        penalty = np.where(found < expected, np.exp(1 - expected / found), 1.0)
        scores = penalty * np.exp(np.log(precisions).mean(axis=1))
    is_known = (matches.sum(axis=1) > 0) & (totals > 0).all(axis=1)
    return np.where(is_known, scores, 0.0)


def _counts(found: list[str], expected: list[list[str]]) -> list[int]:
    matches, totals = [], []
    for n in range(1, _ORDER + 1):
        own = _ngrams(found, n)
        limit: Counter[tuple[str, ...]] = Counter()
        for reference in expected:
            limit |= _ngrams(reference, n)
        matches.append((own & limit).total())
        totals.append(own.total())
    closest = min((len(reference) for reference in expected), key=lambda length: (abs(length - len(found)), length))
    return [len(found), closest, *matches, *totals]


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _streams(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first references of all answers, the second ones, …, as sacrebleu takes them; None where one has fewer."""
    if len(answers) != len(references) or not answers or not all(references):
        raise ValueError("corpus BLEU needs answers, and at least one reference for each of them")
    longest = max(len(expected) for expected in references)
    return [[expected[k] if k < len(expected) else None for expected in references] for k in range(longest)]
