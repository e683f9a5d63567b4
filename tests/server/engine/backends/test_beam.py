"""Our beam search, driven by plain forward passes, against transformers' `generate` on the same model."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from server.engine.backends.hf.beam import BeamSearch, Hypothesis, UnusableLogits
from server.engine.messages import FinishReason, SamplingParams
from tests.server.engine.backends.folders import VOCAB_SIZE, load_reference

PROMPTS = [[5, 60, 7], [(i * 31) % 250 for i in range(40)], [9, 9, 9, 9, 9, 9]]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Qwen2ForCausalLM:
    return load_reference(model_folder)


@torch.inference_mode()
def search(model: Qwen2ForCausalLM, prompt: list[int], stop_ids: list[int], n: int, **params: Any) -> list[Hypothesis]:
    beams = BeamSearch(prompt, SamplingParams(**{"max_tokens": MAX_TOKENS, **params}), frozenset(stop_ids), n)
    while not beams.is_done:
        before = beams.beams
        ids = torch.tensor([prompt + beam.tokens for beam in before])
        parents = beams.advance(model(input_ids=ids).logits[:, -1])
        assert len(parents) == len(beams.beams)
        for parent, beam in zip(parents, beams.beams, strict=True):
            assert beam.tokens[:-1] == before[parent].tokens
    return beams.results()


def generate(
    model: Qwen2ForCausalLM, prompt: list[int], stop_ids: list[int], n: int, **options: Any
) -> list[tuple[list[int], float]]:
    """Stock results: output ids without padding, and score."""
    result: Any = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=stop_ids or [VOCAB_SIZE],  # never comes
        pad_token_id=0,
        num_return_sequences=n,
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": MAX_TOKENS, **options},
    )
    lengths = (result.beam_indices >= 0).sum(-1).tolist()
    ids = result.sequences[:, len(prompt) :].tolist()
    return [
        (row[:length], score) for row, length, score in zip(ids, lengths, result.sequences_scores.tolist(), strict=True)
    ]


def assert_equal(mine: list[Hypothesis], stock: list[tuple[list[int], float]], stop_ids: list[int]) -> None:
    assert [one.tokens for one in mine] == [tokens for tokens, _ in stock]
    assert [one.score for one in mine] == pytest.approx([score for _, score in stock], abs=1e-4)
    for one in mine:
        stop_id = one.tokens[-1] if one.tokens[-1] in stop_ids else None
        assert one.stop_token_id == stop_id
        assert one.finish_reason == (FinishReason.LENGTH if stop_id is None else FinishReason.STOP)


@cache
def _frequent(model: Qwen2ForCausalLM, num_ids: int) -> list[int]:
    """Ids that beams do produce, so that stopping at them happens."""
    seen = [i for prompt in PROMPTS for tokens, _ in generate(model, prompt, [], 4, num_beams=4) for i in tokens[1:]]
    return sorted(set(seen), key=lambda i: (-seen.count(i), i))[:num_ids]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("num_stop_ids", [0, 2])
def test_the_settings_of_the_manual(model: Qwen2ForCausalLM, prompt: list[int], num_stop_ids: int) -> None:
    stop_ids = _frequent(model, num_stop_ids)
    options = {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True}
    assert_equal(
        search(model, prompt, stop_ids, 3, **options), generate(model, prompt, stop_ids, 3, **options), stop_ids
    )


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_stop_ids", [0, 1, 6])
def test_when_the_search_ends(
    model: Qwen2ForCausalLM, early_stopping: bool | str, length_penalty: float, num_stop_ids: int
) -> None:
    stop_ids = _frequent(model, num_stop_ids)
    options: dict[str, Any] = {"num_beams": 4, "early_stopping": early_stopping, "length_penalty": length_penalty}
    reasons = set()
    for prompt in PROMPTS:
        mine = search(model, prompt, stop_ids, 4, **options)
        assert_equal(mine, generate(model, prompt, stop_ids, 4, **options), stop_ids)
        reasons |= {one.finish_reason for one in mine}
    assert (FinishReason.STOP in reasons) == bool(stop_ids), "the case shows nothing"


EDITS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"min_tokens": 7}, {"min_new_tokens": 7}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
    ({"logit_bias": {12: 4.0, 147: -3.0}}, {"sequence_bias": {(12,): 4.0, (147,): -3.0}}),
    (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_tokens": 5},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    ),
]


@pytest.mark.parametrize(("params", "options"), EDITS)
@pytest.mark.parametrize("num_stop_ids", [0, 3])
def test_edits_act_as_in_generate(
    model: Qwen2ForCausalLM, params: dict[str, Any], options: dict[str, Any], num_stop_ids: int
) -> None:
    stop_ids = _frequent(model, num_stop_ids)
    for prompt in PROMPTS:
        mine = search(model, prompt, stop_ids, 3, num_beams=3, **params)
        assert_equal(mine, generate(model, prompt, stop_ids, 3, num_beams=3, **options), stop_ids)


@pytest.mark.parametrize("seed", range(6))
def test_random_prompts_and_widths(model: Qwen2ForCausalLM, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    prompt: list[int] = torch.randint(0, 250, (3 + 7 * seed,), generator=made).tolist()
    stop_ids: list[int] = torch.randint(0, 250, (20,), generator=made).unique().tolist()
    options = {"num_beams": 2 + seed, "early_stopping": [True, False, "never"][seed % 3]}
    mine = search(model, prompt, stop_ids, 2, max_tokens=20, **options)
    assert_equal(mine, generate(model, prompt, stop_ids, 2, max_new_tokens=20, **options), stop_ids)


def test_presence_and_frequency_act_on_each_beams_own_output(model: Qwen2ForCausalLM) -> None:
    """transformers has neither penalty: a processor of the test's own stands in for them."""

    def penalise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, output in enumerate(ids[:, len(PROMPTS[0]) :].tolist()):
            for token_id in set(output):
                scores[row, token_id] -= 0.8 + 0.4 * output.count(token_id)
        return scores

    mine = search(model, PROMPTS[0], [], 3, num_beams=3, presence_penalty=0.8, frequency_penalty=0.4)
    stock = generate(model, PROMPTS[0], [], 3, num_beams=3, logits_processor=[penalise])
    assert_equal(mine, stock, [])
    assert stock != generate(model, PROMPTS[0], [], 3, num_beams=3), "the case shows nothing"


def test_one_token_and_one_stop_id_only() -> None:
    """The last token may be a stop id: then it is a stop, not a length."""
    beams = BeamSearch([1], SamplingParams(max_tokens=1, num_beams=2), frozenset({3}), 2)
    assert beams.advance(torch.tensor([[0.0, 1.0, 2.0, 3.0]])) == []
    assert [(one.tokens, one.finish_reason) for one in beams.results()] == [
        ([3], FinishReason.STOP),
        ([2], FinishReason.LENGTH),
    ]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(poison: float) -> None:
    logits = torch.zeros(1, 50)
    logits[0, 7] = poison
    with pytest.raises(UnusableLogits, match="not a number"):
        BeamSearch([1], SamplingParams(num_beams=2), frozenset(), 1).advance(logits)


def test_rules_that_leave_no_token_are_an_error() -> None:
    """Every id is in the prompt, and none may come twice."""
    beams = BeamSearch(list(range(50)), SamplingParams(num_beams=2, no_repeat_ngram_size=1), frozenset(), 1)
    with pytest.raises(UnusableLogits, match="no token"):
        beams.advance(torch.zeros(1, 50))


def test_fewer_tokens_than_beams_run_with_fewer_beams() -> None:
    prompt = list(range(2, 50))  # leaves ids 0 and 1
    beams = BeamSearch(prompt, SamplingParams(num_beams=4, no_repeat_ngram_size=1, max_tokens=2), frozenset(), 4)
    assert beams.advance(torch.zeros(1, 50)) == [0, 0]
    assert beams.advance(torch.zeros(2, 50)) == []
    assert sorted(one.tokens for one in beams.results()) == [[0, 1], [1, 0]]
