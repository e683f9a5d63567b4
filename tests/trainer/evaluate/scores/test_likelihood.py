"""Likelihoods against torch's cross entropy, and lengths by hand."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from trainer.evaluate.scores.lengths import (
    GivenAnswer,
    answer_scores,
    answer_statistics,
    distinct_share,
    longest_repeat,
)
from trainer.evaluate.scores.likelihood import bits_per_byte, perplexities


def test_perplexity_is_exp_of_torchs_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 50, dtype=torch.float64), torch.randint(50, (30,))
    nats = torch.log_softmax(logits, -1)[torch.arange(30), targets].sum().item()
    entropy = torch.nn.functional.cross_entropy(logits, targets).item()
    assert perplexities(np.array([[nats, 30.0]])) == pytest.approx(math.exp(entropy), rel=1e-12)
    # 2 characters of 3 bytes, 5 of 1
    assert bits_per_byte(nats, "文字 text") == pytest.approx(30 * entropy / 11 / math.log(2))
    with pytest.raises(ValueError, match="empty text"):
        bits_per_byte(nats, "")


def test_a_set_weighs_tokens_alike_and_stays_a_number() -> None:
    sums = np.array([[-1.0 - 9.0, 1.0 + 3.0], [-5000.0, 1.0]])
    found = perplexities(sums)
    assert found[0] == pytest.approx(math.exp(2.5)) and 1e300 < found[1] < math.inf


def plain_repeat(tokens: str) -> int:
    return max(
        (
            size
            for size in range(1, len(tokens) // 2 + 1)
            for first, second in itertools.combinations(range(len(tokens) - size + 1), 2)
            if second - first >= size and tokens[first : first + size] == tokens[second : second + size]
        ),
        default=0,
    )


def test_the_longest_repeat_is_the_one_found_by_trying_all() -> None:
    draw = random.Random(1)
    for _ in range(200):
        tokens = "".join(draw.choice("ab" if draw.random() < 0.5 else "abcde") for _ in range(draw.randrange(14)))
        assert longest_repeat(tokens) == plain_repeat(tokens), tokens
    assert longest_repeat("abcabcabcabc") == 6  # abcabc twice; not 9, which would overlap


def test_distinct_shares_by_hand() -> None:
    assert distinct_share("abab", 2) == pytest.approx(2 / 3)  # ab ba ab
    assert distinct_share("a", 2) == 1.0 and distinct_share("aaaaa", 1) == pytest.approx(0.2)


def test_statistics_by_hand() -> None:
    looping = answer_scores(GivenAnswer(text="Okay " * 10, num_tokens=10, finish_reason="length"))
    assert (
        looping["repeat_share"] == 1.0 and looping["distinct_2"] == pytest.approx(1 / 9) and looping["is_stopped"] == 0
    )
    answers = [GivenAnswer(text="天" * n, num_tokens=n, finish_reason="stop" if n else "length") for n in range(10)]
    found = answer_statistics(answers)
    assert (found["mean_tokens"], found["median_tokens"], found["p90_tokens"], found["max_tokens"]) == (4.5, 4.5, 8, 9)
    assert (found["empty_share"], found["stop_share"], found["num_answers"]) == (0.1, 0.9, 10)
    assert answer_statistics([]) == {}
