"""The sampler against transformers' own processors and warpers, and against plain arithmetic."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.backends.hf.chunks import chunk_peaks, largest
from server.engine.backends.hf.logit_edits import edit_logits
from server.engine.backends.hf.logprobs import token_logprobs
from server.engine.backends.hf.sampler import choose, sample
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


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def edited(logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
    result = logits.clone()
    edit_logits(result, [row.history for row in rows])
    return result


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
    {"temperature": 9.0, "top_k": 300, "top_p": 0.999},
]


def stock_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """What transformers' warpers leave of float32 `[1, V]`. Their sums run in float64, so that rounding does not decide
    which id is the last one in."""
    logits = TemperatureLogitsWarper(temperature)(torch.empty(1, 0), logits).double()
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    warped: torch.Tensor = warpers(torch.empty(1, 0, dtype=torch.long), logits)
    return warped.softmax(-1)[0]


def sampled(logits: torch.Tensor, params: list[dict[str, Any]], uniforms: list[float]) -> list[int]:
    return sample(logits.clone(), chunk_peaks(logits), [SamplingParams(**p) for p in params], uniforms)


def assert_same_kept(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The kept ids' logits are those the stock warpers keep (of equal ones at the edge, any may stay), and asking at
    the middle of every kept id's share finds it. Returns our probabilities."""
    stock = stock_probabilities(logits, **options)
    values, kept = logits[0], stock > 0
    last = values[kept].min()
    ties = (values == last).nonzero()[:, 0]
    num_ties = int((kept & (values == last)).sum())
    mine = torch.where(values > last, stock, 0.0)
    mine[ties[:num_ties]] = stock[kept & (values == last)][0]
    ids = mine.nonzero()[:, 0].tolist()
    middles = (mine.cumsum(-1) - mine / 2)[ids].tolist()
    visible = [i for i, token_id in enumerate(ids) if mine[token_id] > 1e-5]
    drawn = sampled(logits.expand(len(ids), -1), [options] * len(ids), middles)
    assert [drawn[i] for i in visible] == [ids[i] for i in visible], options
    return mine


def assert_draws_follow(logits: torch.Tensor, options: dict[str, Any], uniforms: list[float]) -> None:
    """Each draw is the inverse of the running sum at its point, up to 1e-6 of the whole; a removed id never comes."""
    probabilities = assert_same_kept(logits, options)
    ends = probabilities.cumsum(-1)
    drawn = sampled(logits.expand(len(uniforms), -1), [options] * len(uniforms), uniforms)
    assert all(probabilities[drawn] > 0), options
    points = torch.tensor(uniforms, dtype=torch.float64)
    starts = ends[drawn] - probabilities[drawn]
    assert bool(((starts - 1e-6 <= points) & (points <= ends[drawn] + 1e-6)).all()), options


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", WARPS)
def test_kept_ids_and_probabilities_equal_transformers(seed: int, options: dict[str, Any]) -> None:
    logits = random_logits(1, seed)
    assert_draws_follow(logits, options, [i / 97 for i in range(97)])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([2, 100, 127, 128, 129, 500, 1024, 3000]),
    scale=st.floats(0.05, 12.0),
    step=st.sampled_from([0.0, 0.0625, 0.5]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 2, 8, 9, 40, 200, 2999]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999).map(lambda p: p * 0.99871)),  # no round shares of equal ids
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_any_parameters_keep_what_transformers_keeps(
    seed: int, vocab_size: int, scale: float, step: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """`step` makes ties, as half precision does."""
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    if step:
        logits = (logits / step).round() * step
    options = {"temperature": temperature, "top_k": min(top_k, vocab_size), "top_p": top_p, "min_p": min_p}
    assert_draws_follow(logits, options, [(i + 0.5) / 29 for i in range(29)])


@pytest.mark.parametrize("step", [0.0, 0.125])
def test_flat_logits_where_the_nucleus_is_most_of_the_vocabulary(step: float) -> None:
    logits = random_logits(1, vocab=20_000) / 4
    if step:
        logits = (logits / step).round() * step
    options = {"temperature": 1.0, "top_p": 0.971}
    ends = torch.where(stock_probabilities(logits, **options) > 0, logits[0].double().exp(), 0.0).cumsum(-1)
    if step:  # which of the equal ones stays is open: compare with the whole distribution's lowest of them
        kept = ends.diff(prepend=torch.zeros(1)) > 0
        last = logits[0][kept].min()
        ties = (logits[0] == last).nonzero()[:, 0]
        mine = logits[0] > last
        mine[ties[: int((kept & (logits[0] == last)).sum())]] = True
        ends = torch.where(mine, logits[0].double().exp(), 0.0).cumsum(-1)
    points = [(i + 0.5) / 60 for i in range(60)]
    expected = torch.searchsorted(ends / ends[-1], torch.tensor(points, dtype=torch.float64)).tolist()
    assert sampled(logits.expand(60, -1), [options] * 60, points) == expected


@pytest.mark.parametrize("options", [{"temperature": 1.3}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95}])
def test_drawn_frequencies_follow_transformers_probabilities(options: dict[str, Any]) -> None:
    """Chi-square with a fixed seed; the bound is 4.5 standard deviations above its mean. Rare ids count as one."""
    logits, draws = random_logits(1, seed=3) / 2, 20_000
    probabilities = stock_probabilities(logits, **options)
    row = sequence(seed=1)
    counts = Counter(
        token_id
        for _ in range(draws // 500)
        for token_id in sampled(logits.expand(500, -1), [options] * 500, [row.uniform() for _ in range(500)])
    )
    common = [i for i, p in enumerate(probabilities.tolist()) if p * draws >= 10]
    cells = [(counts[i], float(probabilities[i]) * draws) for i in common]
    rest = (draws - sum(seen for seen, _ in cells), draws - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] > 1 else []
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    assert len(cells) > 5 and chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_rows_drawn_together_equal_rows_drawn_alone() -> None:
    """As on a GPU: one call, every row with parameters of its own, from no cut at all to several."""
    params: list[dict[str, Any]] = [{}, *WARPS, {"top_k": 499, "top_p": 0.9}, {"temperature": 2.0}]
    logits = random_logits(len(params), seed=4)
    for uniform in (0.0, 0.3, 0.77, 0.999):
        together = sampled(logits, params, [uniform] * len(params))
        assert together == [sampled(logits[i : i + 1], [one], [uniform])[0] for i, one in enumerate(params)]


@pytest.mark.parametrize(
    "options", [*WARPS, {"temperature": 1.0, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2}]
)
def test_batch_mates_do_not_change_a_row(options: dict[str, Any]) -> None:
    logits = random_logits(len(WARPS) + 1, seed=8)
    mates = [sequence(seed=i, **other) for i, other in enumerate(WARPS)]
    alone = [choose(logits[-1:], [one]) for one in [sequence([1, 2, 1], seed=77, **options)] for _ in range(10)]
    lively = sequence([1, 2, 1], seed=77, **options)
    mixed = [choose(logits, [*mates, lively])[-1:] for _ in range(10)]
    assert mixed == alone


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    prompts, outputs = [[1, 2, 3, 3, 9], [400], [7, 8]], [[5, 5, 2], [], [8] * 20]
    logits = random_logits(3)
    rows = [sequence(p, o, repetition_penalty=penalty) for p, o in zip(prompts, outputs, strict=True)]
    mine = edited(logits, rows)
    for row, ids in enumerate(p + o for p, o in zip(prompts, outputs, strict=True)):
        stock = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[row : row + 1].clone())
        torch.testing.assert_close(mine[row], stock[0], atol=1e-5, rtol=0)


def test_repetition_penalty_follows_the_growing_output() -> None:
    logits = random_logits(1)
    row = sequence([1], repetition_penalty=1.5)
    for token_id in (4, 4, 9):
        edited(logits, [row])
        row.accept(token_id)
    stock = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, 4, 4, 9]]), logits.clone())
    torch.testing.assert_close(edited(logits, [row]), stock, atol=1e-5, rtol=0)


def test_min_tokens_equals_transformers() -> None:
    logits = random_logits(1)
    for num_tokens in range(4):
        row = sequence([1, 2], [7] * num_tokens, min_tokens=2, stop_token_ids=(11, 12))
        stock = MinLengthLogitsProcessor(4, [11, 12])(torch.ones(1, 2 + num_tokens), logits.clone())
        assert torch.equal(edited(logits, [row]), stock)


def test_presence_and_frequency_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, https://platform.openai.com/docs/guides/text-generation."""
    logits = random_logits(3)
    rows = [
        sequence([5], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25),
        sequence([5], [6], frequency_penalty=-1.0),
        sequence([5], [6]),
    ]
    mine = edited(logits, rows)
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 2 * 0.25
    expected[0, 4] -= 0.5 + 0.25
    expected[1, 6] += 1.0
    torch.testing.assert_close(mine, expected)


def test_logit_bias_is_added_per_row() -> None:
    logits = random_logits(2)
    mine = edited(logits, [sequence(logit_bias={3: 2.5, 499: -100.0}), sequence()])
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[0, 499] -= 100
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99999}, {"min_p": 1e-6}])
def test_draw_is_the_inverse_cdf(options: dict[str, Any]) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log()
    for uniform, expected in [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (math.nextafter(1, 0), 3)]:
        assert sampled(logits, [options], [uniform]) == [expected]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_draw_never_picks_what_was_removed(options: dict[str, Any]) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 200] = 1.0
    for uniform in (0.0, 0.5, math.nextafter(1, 0)):
        assert sampled(logits, [options], [uniform]) == [200]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 4),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    output=st.lists(st.integers(0, 3), max_size=12),
)
def test_no_repeat_ngram_equals_transformers(size: int, prompt: list[int], output: list[int]) -> None:
    """Ids from a set of four, so that n-grams do come again; asked for after every token, and of a fork too."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    history = sequence(prompt, no_repeat_ngram_size=size).history
    for count in range(len(output) + 1):
        stock = NoRepeatNGramLogitsProcessor(size)(torch.tensor([prompt + output[:count]]), logits.clone())
        for one in (history, history.fork()):
            mine = logits.clone()
            edit_logits(mine, [one])
            assert torch.equal(mine, stock)
        if count < len(output):
            history.fork().accept(5)  # a fork that goes another way leaves its parent alone
            history.accept(output[count])


def test_all_edits_together_equal_transformers_order() -> None:
    prompt, output = [1, 2, 3, 1], [2, 9, 1]
    row = sequence(
        prompt,
        output,
        logit_bias={2: 3.0, 9: -2.0},
        repetition_penalty=1.4,
        no_repeat_ngram_size=2,
        min_tokens=5,
        stop_token_ids=(11, 12),
    )
    ids, logits = torch.tensor([prompt + output]), random_logits(1)
    stock = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(2,): 3.0, (9,): -2.0}),
            RepetitionPenaltyLogitsProcessor(1.4),
            NoRepeatNGramLogitsProcessor(2),
            MinNewTokensLengthLogitsProcessor(len(prompt), 5, [11, 12]),
        ]
    )
    expected = stock(ids, logits.clone())
    torch.testing.assert_close(edited(logits, [row]), expected)
    assert expected[0, [2, 11, 12]].tolist() == [-math.inf] * 3, "the case shows nothing"


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


def test_a_row_whose_ids_are_all_banned_yields_none_and_spares_the_others() -> None:
    logits = random_logits(2)
    for temperature in (0.0, 1.0):
        full = sequence(list(range(VOCAB)), temperature=temperature, no_repeat_ngram_size=1)
        assert choose(logits, [full, sequence(temperature=0.0)]) == [None, int(logits[1].argmax())]


def test_choosing_leaves_the_logits_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(3).to(dtype)
        before = logits.clone()
        choose(logits, [sequence(temperature=t, seed=1, logit_bias={3: 9.0}, top_p=0.9) for t in (0.0, 0.5, 1.0)])
        assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [300, 301, 900]] = 1.0
    assert choose(logits, [sequence(temperature=0.0)]) == [300]


@pytest.mark.parametrize("vocab", [100, 128, 1000, 2560])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_largest_equals_topk(vocab: int, count: int) -> None:
    logits = random_logits(3, seed=count, vocab=vocab)
    values, ids = largest(logits, chunk_peaks(logits), count)
    expected = logits.topk(count)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_equal_log_softmax(dtype: torch.dtype) -> None:
    logits = random_logits(3, vocab=1000).to(dtype)
    entries = token_logprobs(logits, [5, 999, int(logits[2].argmax())], [0, 4, 20], [(), (7, 8), ()])
    expected = logits.float().log_softmax(-1)
    for entry, row, count in zip(entries, expected, [0, 4, 20], strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-5)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert entry.top_logprobs == pytest.approx(row.topk(count).values.tolist(), abs=1e-5)
        assert [row[i].item() for i in entry.top_token_ids] == pytest.approx(entry.top_logprobs, abs=1e-5)
    assert entries[1].given_logprobs == pytest.approx(expected[1, [7, 8]].tolist(), abs=1e-5)
    assert entries[2].rank == 1
