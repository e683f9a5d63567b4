"""Shape of answers, without a reference: how long, how they ended, how much they repeat themselves."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluate.scores.words import words


@dataclass(frozen=True, kw_only=True)
class GivenAnswer:
    text: str
    num_tokens: int
    finish_reason: str  # "stop" where the model ended it, "length" where the limit did


def answer_scores(answer: GivenAnswer) -> dict[str, float]:
    """Of one answer, by metric: num_tokens, num_characters, is_empty, is_stopped, distinct_2, repeat_share."""
    tokens = words(answer.text)
    return {
        "num_tokens": float(answer.num_tokens),
        "num_characters": float(len(answer.text)),
        "is_empty": float(not answer.text.strip()),
        "is_stopped": float(answer.finish_reason == "stop"),
        "distinct_2": distinct_share(tokens, 2),
        "repeat_share": 2 * longest_repeat(tokens) / len(tokens) if tokens else 0.0,
    }


def answer_statistics(answers: Sequence[GivenAnswer]) -> dict[str, float]:
    """Of all answers: means of `answer_scores` as shares, median, 90 % and maximum of the tokens; {} for no
    answer."""
    if not answers:
        return {}
    scores = [answer_scores(answer) for answer in answers]
    means = {metric: statistics.fmean(score[metric] for score in scores) for metric in scores[0]}
    lengths = sorted(answer.num_tokens for answer in answers)
    return {
        "num_answers": float(len(answers)),
        "mean_tokens": means["num_tokens"],
        "median_tokens": float(statistics.median(lengths)),
        "p90_tokens": float(lengths[-(-9 * len(lengths) // 10) - 1]),  # the smallest that nine tenths do not exceed
        "max_tokens": float(lengths[-1]),
        "mean_characters": means["num_characters"],
        "empty_share": means["is_empty"],
        "stop_share": means["is_stopped"],
        "distinct_2": means["distinct_2"],
        "repeat_share": means["repeat_share"],
    }


def distinct_share(tokens: Sequence[str], n: int) -> float:
    """Different n-grams over n-grams (distinct-n, Li et al. 2016, arXiv 1510.03055); 1.0 where there is none."""
    ngrams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def longest_repeat(tokens: Sequence[str]) -> int:
    """Length of the longest n-gram that stands twice in it without overlap; 0 where no token does.

    If one of length n does, one of length n - 1 does, so the length is found by halving: O(n² log n) characters.
    """
    letters: dict[str, str] = {}
    text = "".join(letters.setdefault(token, chr(0x10000 + len(letters))) for token in tokens)
    low, high = 0, len(text) // 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _repeats(text, middle) else (low, middle - 1)
    return low


def _repeats(text: str, length: int) -> bool:
    first: dict[str, int] = {}
    return any(
        start - first.setdefault(text[start : start + length], start) >= length
        for start in range(len(text) - length + 1)
    )
