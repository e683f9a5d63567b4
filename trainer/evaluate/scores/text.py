"""How much of a reference's wording an answer has: BLEU and ROUGE-L.

Overlap is not meaning: a right answer in other words scores low, a wrong one in the same words scores high.
"""

from collections.abc import Sequence
from typing import Final

from trainer.evaluate.scores.words import words

TEXT_METRICS: Final = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l")
# For the report's notes: without these words a BLEU cannot be compared with any other.
TEXT_NOTES: Final = {
    "bleu": "sentence BLEU-n of nltk, cumulative uniform weights, words by jieba, smoothing method 3 (NIST), 0 to 1",
    "rouge_l": "F1 of the longest common subsequence, words by jieba, best reference, 0 to 1",
}
_WEIGHTS: Final = tuple(tuple(1 / n for _ in range(n)) for n in (1, 2, 3, 4))


def text_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """`bleu1` to `bleu4` and `rouge_l` of one answer, each 0 to 1; an empty answer has 0 in all.

    BLEU-n = BP · exp(Σ_{i≤n} log p_i / n), p_i = clipped i-gram matches / i-grams of the answer, BP = 1 if the answer
    is longer than the closest reference, else exp(1 - r / c) (Papineni et al. 2002, doi:10.3115/1073083.1073135). An
    order without a match counts 1 / (2^k · i-grams), k = 1, 2, … (Chen & Cherry 2014, method 3), so one answer
    without any 4-gram in common is not 0. Raises ValueError where no reference has a word.
    """
    found, expected = words(answer), [words(reference) for reference in references]
    expected = [reference for reference in expected if reference]
    if not expected:
        raise ValueError("no reference has a word in it: BLEU and ROUGE-L have nothing to compare with")
    if not found:
        return dict.fromkeys(TEXT_METRICS, 0.0)
    scores = [*_bleus(found, expected), max(rouge_l(found, reference) for reference in expected)]
    return dict(zip(TEXT_METRICS, scores, strict=True))


def rouge_l(found: Sequence[str], expected: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two token lists: 2 · LCS / (length + length), 0 to 1.

    ROUGE-L at sentence level with β = 1 (Lin 2004, aclanthology.org/W04-1013): the whole text is one sequence.
    """
    return 2 * common_subsequence(found, expected) / (len(found) + len(expected)) if found and expected else 0.0


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one long integer as a row of the table (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _bleus(found: list[str], expected: list[list[str]]) -> list[float]:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return [float(bleu) for bleu in sentence_bleu(expected, found, _WEIGHTS, SmoothingFunction().method3)]
