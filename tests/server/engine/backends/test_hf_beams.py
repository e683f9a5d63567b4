"""Beam search in the engine against stock `generate`: alone, among streams, with an adapter, on both forwards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from peft import PeftModel

from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.messages import FinishReason
from tests.server.engine.backends.driver import Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.folders import (
    ENDOFTEXT,
    IM_END,
    VOCAB_SIZE,
    assert_agrees,
    greedy_with_gaps,
    load_reference,
)

PROMPTS = [[7 * i % 251 for i in range(start, start + size)] for start, size in [(3, 3), (50, 17), (90, 40), (17, 70)]]
# Settings that people bring along from their own scripts.
USUAL = {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True, "max_tokens": 40, "min_tokens": 1}


@pytest.fixture(scope="module", params=["auto", "generic"])
def backend(model_folder: Path, adapter_folder: Path, request: pytest.FixtureRequest) -> Iterator[HfBackend]:
    forward = cast(Literal["auto", "generic"], request.param)
    made = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=0.05, forward=forward, max_num_seqs=12))
    made.load()
    made.load_adapter(adapter_info("x"), adapter_folder)
    yield made
    made.close()


def generated(model_folder: Path, prompt: list[int], adapter: Path | None, stops: list[int]) -> list[list[int]]:
    """The three best texts of `generate` under the usual settings, without what fills them up behind their end."""
    model: Any = load_reference(model_folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        result = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=5,
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=40,
            no_repeat_ngram_size=2,
            num_return_sequences=3,
            early_stopping=True,
            eos_token_id=stops or [VOCAB_SIZE],  # without: one that never comes
            pad_token_id=ENDOFTEXT,
        )
    texts = []
    for ids in result[:, len(prompt) :].tolist():
        end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
        texts.append(ids[:end])
    return texts


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: f"{len(prompt)} tokens")
@pytest.mark.parametrize("user", [None, "x"])
def test_the_usual_settings(
    backend: HfBackend, model_folder: Path, adapter_folder: Path, prompt: list[int], user: str | None
) -> None:
    adapter_id = adapter_info(user).id if user else None
    texts = run(backend, ask(prompt, n=3, adapter=adapter_id, ignore_eos=True, **USUAL))
    expected = generated(model_folder, prompt, adapter_folder if user else None, [])
    assert [texts["a", i].token_ids for i in range(3)] == expected
    assert {text.finish_reason for text in texts.values()} == {FinishReason.LENGTH}


def test_beams_that_end_in_a_stop_id(backend: HfBackend, model_folder: Path) -> None:
    for prompt in PROMPTS:
        likely = [text[7] for text in generated(model_folder, prompt, None, [])][:2]
        stops = sorted({*likely, IM_END, ENDOFTEXT})
        texts = run(backend, ask(prompt, n=3, stop_token_ids=tuple(likely), **USUAL))
        assert [texts["a", i].token_ids for i in range(3)] == generated(model_folder, prompt, None, stops)
        assert texts["a", 0].finish_reason is FinishReason.STOP
        assert texts["a", 0].last.stop_token_id == texts["a", 0].token_ids[-1]


def test_beams_and_streams_do_not_disturb_each_other(backend: HfBackend, model_folder: Path) -> None:
    texts: Texts = {}
    streams = [ask(prompt, f"s{i}", max_tokens=40, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    submit(backend, *streams[:2])
    for _ in range(3):
        collect(backend.step(), texts)
    submit(backend, ask(PROMPTS[2], "beams", n=3, ignore_eos=True, **USUAL), *streams[2:])
    finish(backend, texts)
    assert [texts["beams", i].token_ids for i in range(3)] == generated(model_folder, PROMPTS[2], None, [])
    for i, prompt in enumerate(PROMPTS):
        assert_agrees(texts[f"s{i}", 0].token_ids, greedy_with_gaps(model_folder, prompt, 40))
    assert backend._rows.num_live == 0
