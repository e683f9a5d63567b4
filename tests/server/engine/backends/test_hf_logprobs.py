"""Logprobs of the hf backend against log_softmax of the stock model's logits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.messages import TokenLogprobs
from tests.server.engine.backends.driver import ask, run
from tests.server.engine.backends.folders import load_reference

PROMPT = [(i * 31) % 250 for i in range(150)]  # more than two scoring chunks


@pytest.fixture(scope="module")
def backend(model_folder: Path) -> Iterator[HfBackend]:
    made = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=0.05, prefill_chunk=100))
    made.load()
    yield made
    made.close()


@torch.inference_mode()
def reference(model_folder: Path, token_ids: list[int]) -> torch.Tensor:
    """`[q, V]` logprobs of what follows each token."""
    logprobs: torch.Tensor = load_reference(model_folder)(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return logprobs


def assert_equal(entry: TokenLogprobs | None, expected: torch.Tensor, token_id: int, count: int) -> None:
    assert entry is not None and entry.token_id == token_id
    ordered = expected.sort(descending=True)
    assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-3)
    assert entry.rank == int((expected > expected[token_id]).sum()) + 1
    assert entry.top_logprobs == pytest.approx(ordered.values[:count].tolist(), abs=1e-3)
    assert entry.top_token_ids == ordered.indices[:count].tolist()


def test_prompt_logprobs_equal_the_models(backend: HfBackend, model_folder: Path) -> None:
    text = run(backend, ask(PROMPT, max_tokens=0, prompt_logprobs=4))["a", 0]
    expected = reference(model_folder, PROMPT)
    assert text.prompt_logprobs is not None
    for i, token_id in enumerate(PROMPT[1:]):
        assert_equal(text.prompt_logprobs[i + 1], expected[i], token_id, 4)


def test_logprobs_are_raw_whatever_the_sampler_does(backend: HfBackend, model_folder: Path) -> None:
    request = ask(
        PROMPT,
        max_tokens=10,
        ignore_eos=True,
        temperature=2.0,
        top_k=50,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        logit_bias={7: 5.0},
        seed=1,
        logprobs=3,
        logprob_token_ids=(7, 250),
    )
    text = run(backend, request)["a", 0]
    expected = reference(model_folder, PROMPT + text.token_ids)[len(PROMPT) - 1 :]
    for entry, row, token_id in zip(text.logprobs, expected, text.token_ids, strict=False):
        assert_equal(entry, row, token_id, 3)
        assert entry.given_logprobs == pytest.approx([row[7].item(), row[250].item()], abs=1e-3)
