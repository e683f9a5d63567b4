"""What only the fake backend promises: the echo, the pace, and next to no work."""

import json
import time
from pathlib import Path

import pytest

from server.engine.backends.fake import FakeBackend, FakeOptions
from server.engine.messages import FinishReason
from server.errors import ConfigError
from tests.server.engine.backends.driver import Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.folders import ENDOFTEXT, IM_END, IM_START, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No weights."""
    path = tmp_path_factory.mktemp("model")
    config = {"model_type": "qwen2", "vocab_size": 264, "max_position_embeddings": 512, "eos_token_id": IM_END}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


def loaded(folder: Path, tokens_per_s: float = 0.0, max_num_seqs: int = 256) -> FakeBackend:
    backend = FakeBackend(FakeOptions(folder, "fake", max_num_seqs=max_num_seqs, tokens_per_s=tokens_per_s))
    backend.load()
    return backend


def test_echoes_plain_tokens_rotated_by_choice_then_stops(folder: Path) -> None:
    texts = run(loaded(folder), ask([IM_START, 5, 6, ENDOFTEXT, 7, IM_END], n=4, max_tokens=50))
    echoes = [[5, 6, 7], [6, 7, 5], [7, 5, 6], [5, 6, 7]]
    assert [texts["a", i].token_ids for i in range(4)] == [[*echo, IM_END] for echo in echoes]
    assert {text.finish_reason for text in texts.values()} == {FinishReason.STOP}


def test_adapter_rotates_once_more(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    backend = loaded(folder)
    backend.load_adapter(adapter_info("x"), tmp_path)
    assert run(backend, ask([5, 6, 7], adapter=adapter_info("x").id))["a", 0].token_ids == [6, 7, 5, IM_END]


def test_goes_round_when_it_must_not_stop(folder: Path) -> None:
    backend = loaded(folder)
    assert run(backend, ask([5, 6], max_tokens=5, ignore_eos=True))["a", 0].token_ids == [5, 6, 5, 6, 5]
    assert run(backend, ask([5, 6], max_tokens=9, min_tokens=4))["a", 0].token_ids == [5, 6, 5, 6, IM_END]


def test_prompt_of_control_tokens_only_still_gets_a_text(folder: Path) -> None:
    assert run(loaded(folder), ask([IM_START, IM_END]))["a", 0].token_ids == [0, IM_END]


@pytest.mark.parametrize("tokens_per_s", [50.0, 400.0])
def test_pace_keeps_to_the_clock(folder: Path, tokens_per_s: float) -> None:
    """Never early; a step never blocks for long. Late only as far as the machine is, so no upper bound on the whole."""
    backend = loaded(folder, tokens_per_s)
    submit(backend, ask([5, 6], n=8, max_tokens=20, ignore_eos=True))
    started = time.monotonic()
    texts: Texts = {}
    num_steps = 0
    while backend.has_work:
        collect(backend.step(), texts)
        num_steps += 1
        due = (time.monotonic() - started) * tokens_per_s
        assert all(len(text.token_ids) <= due + 1 for text in texts.values())
    assert time.monotonic() - started >= 19 / tokens_per_s
    assert num_steps < 200, "busy waiting"


def test_late_steps_are_made_up_for(folder: Path) -> None:
    """The schedule counts from its start: after a pause the tokens that are due come without waiting."""
    backend = loaded(folder, tokens_per_s=100.0)
    submit(backend, ask([5], max_tokens=30, ignore_eos=True))
    time.sleep(0.35)  # the pause is the point
    started = time.monotonic()
    assert [len(backend.step()) for _ in range(30)] == [1] * 30
    assert time.monotonic() - started < 0.3
    assert not backend.has_work


def test_a_step_of_128_sequences_is_cheap(folder: Path) -> None:
    backend = loaded(folder)
    submit(backend, *(ask([5, 6, 7], str(i), max_tokens=200, ignore_eos=True) for i in range(128)))
    started = time.process_time()
    texts = finish(backend)
    assert sum(len(text.token_ids) for text in texts.values()) == 128 * 200
    assert (time.process_time() - started) / (128 * 200) < 50e-6  # seconds of CPU per token; about 3e-6 is usual


def test_needs_sizes_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="vocab_size"):
        loaded(tmp_path)
