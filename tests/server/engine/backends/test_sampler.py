"""The sampler against transformers' own processors and warpers, and against plain arithmetic."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.backends.hf.sampler import choose, draw, penalise, warp
from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import Generate, SamplingParams

VOCAB = 500


def sequence(
    prompt: list[int] | None = None, output: list[int] | None = None, index: int = 0, **params: Any
) -> Sequence:
    stop_ids = frozenset(params.get("stop_token_ids", ()))
    request = Generate(
        request_id="a", prompt_token_ids=prompt or [1], params=SamplingParams(**{"max_tokens": 10_000, **params})
    )
    made = Sequence(request, index, stop_ids)
    for token_id in output or []:
        made.accept(token_id)
    return made


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


WARPS: list[dict[str, Any]] = [
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 10_000, "top_p": 0.999, "min_p": 1.0},
]


def stock_warp(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Any:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.empty(1, 0, dtype=torch.long), logits)


@pytest.mark.parametrize("seed", range(5))
def test_warped_probabilities_equal_transformers(seed: int) -> None:
    logits = random_logits(len(WARPS), seed)
    before = logits.clone()
    mixed = warp(logits, [SamplingParams(**options) for options in WARPS]).softmax(-1)
    for row, options in enumerate(WARPS):
        expected = stock_warp(before[row : row + 1].clone(), **options).softmax(-1)[0]
        assert torch.equal(mixed[row] == 0, expected == 0), options
        torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=0)
    assert torch.equal(logits, before), "the raw logits were changed"


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    prompts, outputs = [[1, 2, 3, 3, 9], [400], [7, 8]], [[5, 5, 2], [], [8] * 20]
    logits = random_logits(3)
    rows = [sequence(p, o, repetition_penalty=penalty) for p, o in zip(prompts, outputs, strict=True)]
    mine = penalise(logits, rows)
    for row, ids in enumerate(p + o for p, o in zip(prompts, outputs, strict=True)):
        stock = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[row : row + 1].clone())
        torch.testing.assert_close(mine[row], stock[0], atol=1e-5, rtol=0)


def test_repetition_penalty_follows_the_growing_output() -> None:
    logits = random_logits(1)
    row = sequence([1], repetition_penalty=1.5)
    for token_id in (4, 4, 9):
        penalise(logits, [row])
        row.accept(token_id)
    stock = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, 4, 4, 9]]), logits.clone())
    torch.testing.assert_close(penalise(logits, [row]), stock, atol=1e-5, rtol=0)


def test_min_tokens_equals_transformers() -> None:
    logits = random_logits(1)
    for num_tokens in range(4):
        row = sequence([1, 2], [7] * num_tokens, min_tokens=2, stop_token_ids=(11, 12))
        stock = MinLengthLogitsProcessor(4, [11, 12])(torch.ones(1, 2 + num_tokens), logits.clone())
        assert torch.equal(penalise(logits, [row]), stock)


def test_presence_and_frequency_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, https://platform.openai.com/docs/guides/text-generation."""
    logits = random_logits(3)
    rows = [
        sequence([5], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25),
        sequence([5], [6], frequency_penalty=-1.0),
        sequence([5], [6]),
    ]
    mine = penalise(logits, rows)
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 2 * 0.25
    expected[0, 4] -= 0.5 + 0.25
    expected[1, 6] += 1.0
    torch.testing.assert_close(mine, expected)


def test_logit_bias_is_added_per_row() -> None:
    logits = random_logits(2)
    mine = penalise(logits, [sequence(logit_bias={3: 2.5, 499: -100.0}), sequence()])
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[0, 499] -= 100
    torch.testing.assert_close(mine, expected)


def test_draw_is_the_inverse_cdf() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log()
    for uniform, expected in [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (math.nextafter(1, 0), 3)]:
        assert draw(logits, [uniform]) == [expected]


def test_draw_never_picks_what_was_removed() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 7] = 1.0
    assert draw(logits, [0.0]) == draw(logits, [0.5]) == draw(logits, [math.nextafter(1, 0)]) == [7]


def test_drawn_frequencies_follow_the_probabilities() -> None:
    """Chi-square over 8 ids; the bound is its 99.99 % point for 7 degrees of freedom, and the seed is fixed."""
    probabilities = torch.tensor([0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02])
    row, draws = sequence(seed=1, temperature=1.0), 20_000
    uniforms = [row.uniform() for _ in range(draws)]
    counts = Counter(draw(probabilities.log().expand(draws, -1), uniforms))
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(probabilities.tolist()))
    assert chi_square < 29.9


def test_random_stream_depends_on_seed_and_index_only() -> None:
    def stream(**kwargs: Any) -> list[float]:
        made = sequence(**kwargs)
        return [made.uniform() for _ in range(3)]

    assert stream(seed=5) == stream(seed=5) == stream(seed=4, index=1)
    assert len({tuple(stream(seed=s)) for s in (-5, 5, 6, 2**40)}) == 4
    assert stream() != stream()


def test_greedy_and_sampled_rows_do_not_touch_each_other() -> None:
    logits = random_logits(3)
    greedy = logits.argmax(-1).tolist()
    sampled = sequence(temperature=5.0, seed=3)
    mixed = choose(logits, [sequence(temperature=0.0), sampled, sequence(temperature=1e-6)])
    alone = choose(logits[1:2], [sequence(temperature=5.0, seed=3)])
    assert [mixed[0], mixed[2]] == [greedy[0], greedy[2]]
    assert mixed[1] == alone[0]


def test_greedy_obeys_penalties() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    assert choose(logits, [sequence(temperature=0.0, logit_bias={best: -100.0})]) != [best]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_yield_none_and_spare_the_others(poison: float, temperature: float) -> None:
    logits = random_logits(3)
    logits[1, 17] = poison
    chosen = choose(logits, [sequence(temperature=temperature, seed=1) for _ in range(3)])
    clean = choose(random_logits(3), [sequence(temperature=temperature, seed=1) for _ in range(3)])
    assert chosen[1] is None
    assert (chosen[0], chosen[2]) == (clean[0], clean[2])


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = random_logits(2).bfloat16()
    rows = [sequence(temperature=0.9, top_p=0.7, seed=2) for _ in range(2)]
    again = [sequence(temperature=0.9, top_p=0.7, seed=2) for _ in range(2)]
    assert choose(logits, rows) == choose(logits.float(), again)
