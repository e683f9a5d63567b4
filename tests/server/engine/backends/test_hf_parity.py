"""Greedy text of the hf backend against stock `generate`, however sequences share a batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from server.engine.backends.hf import HfBackend, HfOptions
from tests.server.engine.backends.driver import Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.folders import ALL_LINEAR, assert_agrees, greedy_with_gaps, write_adapter

NUM_TOKENS = 40
PROMPTS = [[7 * i % 251 for i in range(start, start + size)] for start, size in
           [(3, 3), (50, 17), (90, 40), (11, 9), (200, 1), (17, 70), (64, 5), (31, 33)]]  # fmt: skip
ADAPTERS = {
    "big": {"seed": 2, "r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "small": {"seed": 3, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, model_folder, **options) for name, options in ADAPTERS.items()}


@pytest.fixture(scope="module")
def backend(model_folder: Path, adapters: dict[str, Path]) -> Iterator[HfBackend]:
    backend = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=0.05, max_num_seqs=8, prefill_chunk=16))
    backend.load()
    for name, folder in adapters.items():
        backend.load_adapter(adapter_info(name), folder)
    yield backend
    backend.close()


def test_reference_text_is_worth_comparing(model_folder: Path) -> None:
    token_ids, gaps = greedy_with_gaps(model_folder, PROMPTS[0], NUM_TOKENS)
    assert len(set(token_ids)) > NUM_TOKENS // 2
    assert sum(gap > 1e-3 for gap in gaps) > NUM_TOKENS * 0.9


@pytest.mark.parametrize("prompt", PROMPTS[:4], ids=lambda prompt: f"{len(prompt)} tokens")
def test_alone(backend: HfBackend, model_folder: Path, prompt: list[int]) -> None:
    texts = run(backend, ask(prompt, max_tokens=NUM_TOKENS, ignore_eos=True))
    assert_agrees(texts["a", 0].token_ids, greedy_with_gaps(model_folder, prompt, NUM_TOKENS))


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter(backend: HfBackend, model_folder: Path, adapters: dict[str, Path], name: str) -> None:
    base, adapted = ask(PROMPTS[1], "base", max_tokens=NUM_TOKENS, ignore_eos=True), adapter_info(name).id
    texts = run(backend, base, ask(PROMPTS[1], max_tokens=NUM_TOKENS, ignore_eos=True, adapter=adapted))
    assert texts["a", 0].token_ids != texts["base", 0].token_ids
    assert_agrees(texts["a", 0].token_ids, greedy_with_gaps(model_folder, PROMPTS[1], NUM_TOKENS, adapters[name]))


def test_eight_join_at_different_steps_with_two_adapters(
    backend: HfBackend, model_folder: Path, adapters: dict[str, Path]
) -> None:
    users: list[str | None] = [None, "big", "small", None, "big", "small", None, "big"]
    joins = [0, 0, 2, 3, 5, 5, 11, 12]
    lengths = [NUM_TOKENS, 7, NUM_TOKENS, 12, NUM_TOKENS, 9, NUM_TOKENS, NUM_TOKENS]  # early leavers make holes
    texts: Texts = {}
    for step in range(max(joins) + 1):
        for i, (prompt, user) in enumerate(zip(PROMPTS, users, strict=True)):
            if joins[i] == step:
                adapter = None if user is None else adapter_info(user).id
                submit(backend, ask(prompt, str(i), max_tokens=lengths[i], ignore_eos=True, adapter=adapter))
        collect(backend.step(), texts)
    finish(backend, texts)
    for i, (prompt, user) in enumerate(zip(PROMPTS, users, strict=True)):
        reference = greedy_with_gaps(model_folder, prompt, lengths[i], adapters[user] if user else None)
        assert_agrees(texts[str(i), 0].token_ids, reference)


def test_unloaded_adapters_leave_no_trace(model_folder: Path, adapters: dict[str, Path]) -> None:
    backend = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=0.05))
    backend.load()
    for name, folder in adapters.items():
        backend.load_adapter(adapter_info(name), folder)
    backend.unload_adapter(adapter_info("big").id)
    request = ask(PROMPTS[2], max_tokens=12, ignore_eos=True, adapter=adapter_info("small").id)
    reference = greedy_with_gaps(model_folder, PROMPTS[2], 12, adapters["small"])
    assert_agrees(run(backend, request)["a", 0].token_ids, reference)
    backend.unload_adapter(adapter_info("small").id)
    projections = set(backend._network.projections.values())
    assert not any(p.lora.columns or p.lora.a.numel() or p.lora.b.numel() for p in projections)


@pytest.mark.parametrize("forward", ["auto", "generic"])
def test_an_adapter_on_the_output_head(model_folder: Path, tmp_path: Path, forward: Literal["auto", "generic"]) -> None:
    """The head sees fewer tokens than the rest of the network, and must still know whose they are."""
    folder = write_adapter(tmp_path, model_folder, target_modules=["lm_head", "q_proj"])
    backend = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=0.05, forward=forward))
    backend.load()
    backend.load_adapter(adapter_info("head"), folder)
    user = adapter_info("head").id
    submit(
        backend,
        *(ask(PROMPTS[i], str(i), max_tokens=12, ignore_eos=True, adapter=[None, user][i % 2]) for i in range(4)),
    )
    texts = finish(backend)
    for i in range(4):
        reference = greedy_with_gaps(model_folder, PROMPTS[i], 12, folder if i % 2 else None)
        assert_agrees(texts[str(i), 0].token_ids, reference)
    backend.close()
