"""What every backend promises (`server/engine/backends/base.py`, `server/engine/messages.py`)."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.backends.base import AdapterError, Backend, RequestRefused
from server.engine.backends.fake import FakeBackend, FakeOptions
from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.backends.vllm import VllmBackend
from server.engine.messages import EngineStats, FinishReason, ModelInfo
from tests.server.engine.backends.driver import (
    Text,
    Texts,
    adapter_info,
    ask,
    collect,
    finish,
    run,
    step_until_running,
    submit,
)
from tests.server.engine.backends.folders import ENDOFTEXT, IM_END, MAX_POSITIONS, VOCAB_SIZE
from tests.server.engine.backends.vllm_setup import VLLM, tiny_options, write_model_for_vllm

MAX_NUM_SEQS = 4
PROMPT = [10, 20, 30, 40, 50]
BUILDERS: dict[str, Callable[[Path], Backend]] = {
    "fake": lambda folder: FakeBackend(FakeOptions(folder, "tiny", max_num_seqs=MAX_NUM_SEQS)),
    "hf": lambda folder: HfBackend(
        HfOptions(folder, "tiny", kv_cache_gib=0.05, max_num_seqs=MAX_NUM_SEQS, prefill_chunk=64)
    ),
    "vllm": lambda folder: VllmBackend(
        tiny_options(folder, max_num_seqs=MAX_NUM_SEQS, more={"max_num_batched_tokens": 64})
    ),
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=VLLM if name == "vllm" else ()) for name in BUILDERS])
def loaded(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Backend, ModelInfo]]:
    if request.param == "vllm":
        model_folder = write_model_for_vllm(tmp_path_factory.mktemp("vllm") / model_folder.name)
    backend = BUILDERS[request.param](model_folder)
    yield backend, backend.load()
    backend.close()


@pytest.fixture
def backend(loaded: tuple[Backend, ModelInfo]) -> Iterator[Backend]:
    """The same loaded backend for every test; each must leave it empty."""
    yield loaded[0]
    assert not loaded[0].has_work
    stats = loaded[0].stats
    assert (stats.num_running, stats.num_waiting, stats.kv_tokens_used) == (0, 0, 0)


@pytest.fixture
def model(loaded: tuple[Backend, ModelInfo]) -> ModelInfo:
    return loaded[1]


def free_run(backend: Backend, num_tokens: int = 12) -> list[int]:
    """Greedy ids that no stop id ends."""
    return run(backend, ask(PROMPT, max_tokens=num_tokens, ignore_eos=True))["a", 0].token_ids


def refusal(backend: Backend, request: object) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        backend.check(request)  # type: ignore[arg-type]
    return caught.value


def test_model_info_tells_effective_limits(model: ModelInfo, model_folder: Path) -> None:
    assert (model.name, Path(model.path).name) == ("tiny", model_folder.name)
    assert (model.max_model_len, model.vocab_size, model.max_num_seqs) == (MAX_POSITIONS, VOCAB_SIZE, MAX_NUM_SEQS)
    assert model.stop_token_ids == (IM_END, ENDOFTEXT)
    assert model.kv_cache_tokens >= model.max_model_len
    assert model.max_logprobs == 20
    assert model.weights_hash


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens(backend: Backend, max_tokens: int) -> None:
    text = run(backend, ask(PROMPT, max_tokens=max_tokens, ignore_eos=True))["a", 0]
    assert len(text.token_ids) == max_tokens
    assert (text.finish_reason, text.last.stop_token_id) == (FinishReason.LENGTH, None)


def test_max_tokens_zero_only_reads_the_prompt(backend: Backend) -> None:
    text = run(backend, ask(PROMPT, max_tokens=0, prompt_logprobs=0))["a", 0]
    assert (text.token_ids, text.finish_reason, len(text.outputs)) == ([], FinishReason.LENGTH, 1)
    assert text.prompt_logprobs is not None and len(text.prompt_logprobs) == len(PROMPT)


def test_full_context_can_be_used(backend: Backend) -> None:
    prompt = [i % 250 for i in range(MAX_POSITIONS - 3)]
    text = run(backend, ask(prompt, max_tokens=3, ignore_eos=True))["a", 0]
    assert len(text.token_ids) == 3


def test_stop_token_id_ends_the_text_and_is_included(backend: Backend) -> None:
    free = free_run(backend)
    stop_id = free[3]
    text = run(backend, ask(PROMPT, max_tokens=12, stop_token_ids=(stop_id,), ignore_eos=True))["a", 0]
    assert text.token_ids == free[: free.index(stop_id) + 1]
    assert (text.finish_reason, text.last.stop_token_id) == (FinishReason.STOP, stop_id)


@pytest.mark.parametrize("stop_id", [IM_END, ENDOFTEXT])
def test_models_own_stop_ids_stop_unless_ignored(backend: Backend, stop_id: int) -> None:
    """A bias makes the model say it at once; the fake backend says its stop id by itself, after the echo."""
    forced = {"logit_bias": {stop_id: 100.0}, "max_tokens": 9}
    text = run(backend, ask(PROMPT, **forced))["a", 0]
    assert text.finish_reason is FinishReason.STOP
    assert text.last.stop_token_id == text.token_ids[-1]
    assert text.token_ids[-1] in (IM_END, ENDOFTEXT)
    ignored = run(backend, ask(PROMPT, ignore_eos=True, **forced))["a", 0]
    assert (len(ignored.token_ids), ignored.finish_reason) == (9, FinishReason.LENGTH)


def test_min_tokens_bans_stop_ids_until_then(backend: Backend) -> None:
    free = free_run(backend)
    stops = {"stop_token_ids": (free[0], IM_END), "ignore_eos": True, "max_tokens": 12}
    at_once = run(backend, ask(PROMPT, **stops))["a", 0]
    assert len(at_once.token_ids) == 1
    later = run(backend, ask(PROMPT, min_tokens=5, **stops))["a", 0]
    assert len(later.token_ids) >= 6 or later.finish_reason is FinishReason.LENGTH
    assert free[0] not in later.token_ids[:5]


def test_n_choices_each_end_once(backend: Backend) -> None:
    texts = run(backend, ask(PROMPT, n=3, max_tokens=6, ignore_eos=True, temperature=1.5, seed=1))
    assert set(texts) == {("a", 0), ("a", 1), ("a", 2)}
    assert len({tuple(text.token_ids) for text in texts.values()}) == 3
    assert all(len(text.token_ids) == 6 for text in texts.values())


def test_more_choices_than_rows(backend: Backend) -> None:
    texts = run(backend, ask(PROMPT, n=2 * MAX_NUM_SEQS + 1, max_tokens=3, ignore_eos=True))
    assert len(texts) == 2 * MAX_NUM_SEQS + 1
    assert all(len(text.token_ids) == 3 for text in texts.values())


def test_choice_i_uses_seed_plus_i(backend: Backend) -> None:
    sampling = {"temperature": 1.5, "max_tokens": 8, "ignore_eos": True}
    texts = run(backend, ask(PROMPT, n=2, seed=40, **sampling))
    alone = run(backend, ask(PROMPT, "b", n=1, seed=40, **sampling))
    assert texts["a", 0].token_ids == alone["b", 0].token_ids


def test_seeded_text_does_not_depend_on_batch_mates(backend: Backend) -> None:
    seeded = {"temperature": 1.2, "top_p": 0.95, "seed": 7, "max_tokens": 20, "ignore_eos": True}
    alone = run(backend, ask(PROMPT, **seeded))["a", 0].token_ids
    assert run(backend, ask(PROMPT, **seeded))["a", 0].token_ids == alone
    mates = [ask([60 + i] * (3 + 5 * i), f"mate {i}", temperature=1.0, max_tokens=4 + 6 * i) for i in range(3)]
    texts: Texts = {}
    submit(backend, *mates)
    collect(backend.step(), texts)
    collect(backend.step(), texts)
    submit(backend, ask(PROMPT, **seeded))
    assert finish(backend, texts)["a", 0].token_ids == alone


def test_logprobs_counts_and_shapes(backend: Backend) -> None:
    given = (5, 77)
    text = run(
        backend,
        ask(PROMPT, max_tokens=4, ignore_eos=True, temperature=1.0, seed=3, logprobs=5, logprob_token_ids=given),
    )["a", 0]
    assert [entry.token_id for entry in text.logprobs] == text.token_ids
    for entry in text.logprobs:
        assert len(entry.top_token_ids) == len(entry.top_logprobs) == 5
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        assert sum(math.exp(logprob) for logprob in entry.top_logprobs) <= 1 + 1e-5
        assert len(entry.given_logprobs) == len(given) and max(entry.given_logprobs) <= 0
        assert 1 <= entry.rank <= VOCAB_SIZE
        if entry.rank <= 5:
            assert entry.top_logprobs[entry.rank - 1] == pytest.approx(entry.logprob)
        else:
            assert entry.logprob <= entry.top_logprobs[-1]


def test_logprobs_zero_gives_the_chosen_token_only(backend: Backend) -> None:
    text = run(backend, ask(PROMPT, max_tokens=2, ignore_eos=True, logprobs=0))["a", 0]
    assert [(len(entry.top_token_ids), entry.given_logprobs) for entry in text.logprobs] == [(0, []), (0, [])]


def test_no_logprobs_unless_asked(backend: Backend) -> None:
    text = run(backend, ask(PROMPT, max_tokens=2, ignore_eos=True))["a", 0]
    assert all(output.logprobs is None and output.prompt_logprobs is None for output in text.outputs)


@pytest.mark.parametrize("num_prompt", [1, 2, 64, 65, 200])
def test_prompt_logprobs_come_once_with_the_first_output(backend: Backend, num_prompt: int) -> None:
    prompt = [(i * 37) % 250 for i in range(num_prompt)]
    texts = run(backend, ask(prompt, n=2, max_tokens=2, ignore_eos=True, prompt_logprobs=3))
    first = texts["a", 0].outputs[0].prompt_logprobs
    assert first is not None and len(first) == num_prompt and first[0] is None
    assert [entry.token_id for entry in first[1:] if entry] == prompt[1:]
    assert all(len(entry.top_token_ids) == 3 for entry in first[1:] if entry)
    assert texts["a", 1].prompt_logprobs is None  # the same prompt: the first choice carries them


def test_abort_everything(backend: Backend) -> None:
    before = backend.stats.num_aborted
    submit(backend, ask(PROMPT, n=3, max_tokens=50, ignore_eos=True))
    backend.step()
    backend.abort("a")
    assert not backend.has_work
    assert backend.step() == []
    assert backend.stats.num_aborted == before + 3


def test_abort_one_choice(backend: Backend) -> None:
    submit(backend, ask(PROMPT, n=3, max_tokens=6, ignore_eos=True))
    texts: Texts = {}
    collect(backend.step(), texts)
    collect(backend.step(), texts)
    backend.abort("a", 1)
    finish(backend, texts)
    assert [texts["a", i].finish_reason for i in (0, 2)] == [FinishReason.LENGTH] * 2
    assert ("a", 1) not in texts or texts["a", 1].finish_reason is None


@pytest.mark.parametrize("gone", range(MAX_NUM_SEQS))
def test_the_others_go_on_unchanged_when_one_leaves(backend: Backend, gone: int) -> None:
    requests = [ask([3 + i, 99, 40 * i], str(i), max_tokens=14, ignore_eos=True) for i in range(MAX_NUM_SEQS)]
    alone = [run(backend, request)[str(i), 0].token_ids for i, request in enumerate(requests)]
    submit(backend, *requests)
    texts: Texts = {}
    for _ in range(5):
        collect(backend.step(), texts)
    backend.abort(str(gone))
    finish(backend, texts)
    for i, expected in enumerate(alone):
        if i != gone:
            assert texts[str(i), 0].token_ids == expected


def test_abort_while_waiting(backend: Backend) -> None:
    submit(backend, ask(PROMPT, "long", n=MAX_NUM_SEQS, max_tokens=8, ignore_eos=True), ask(PROMPT, "late"))
    texts: Texts = {}
    step_until_running(backend, MAX_NUM_SEQS, texts)
    assert backend.stats.num_waiting >= 1
    backend.abort("late")
    assert backend.stats.num_waiting == 0
    assert ("late", 0) not in finish(backend, texts)


def test_abort_of_unknown_ids_is_ignored(backend: Backend) -> None:
    before = backend.stats.num_aborted
    backend.abort("nobody")
    backend.abort("nobody", 3)
    assert backend.stats.num_aborted == before


def test_stats_count(backend: Backend) -> None:
    before = backend.stats
    submit(backend, ask(PROMPT, n=2, max_tokens=20, ignore_eos=True))
    assert backend.has_work and backend.stats.num_waiting == 2
    texts: Texts = {}
    step_until_running(backend, 2, texts)
    running: EngineStats = backend.stats
    assert 0 < running.kv_tokens_used <= running.kv_tokens_total
    finish(backend, texts)
    after = backend.stats
    assert after.generated_tokens_total - before.generated_tokens_total == 40
    assert after.prompt_tokens_total > before.prompt_tokens_total
    assert after.num_steps > before.num_steps


def test_no_more_than_max_num_seqs_run(backend: Backend) -> None:
    submit(backend, *(ask(PROMPT, str(i), max_tokens=4, ignore_eos=True) for i in range(3 * MAX_NUM_SEQS)))
    texts: Texts = {}
    while backend.has_work:
        collect(backend.step(), texts)
        assert backend.stats.num_running <= MAX_NUM_SEQS
    assert all(len(text.token_ids) == 4 for text in texts.values()) and len(texts) == 3 * MAX_NUM_SEQS


def test_lower_priority_value_runs_first_then_first_come(backend: Backend) -> None:
    submit(backend, ask(PROMPT, "filler", n=MAX_NUM_SEQS, max_tokens=4, ignore_eos=True))
    texts: Texts = {}
    collect(backend.step(), texts)
    for request_id, priority in (("late", 1), ("normal", 0), ("normal too", 0), ("urgent", -1)):
        submit(backend, ask(PROMPT, request_id, priority=priority, n=MAX_NUM_SEQS, max_tokens=1, ignore_eos=True))
    finish(backend, texts)
    ended = list(dict.fromkeys(request_id for request_id, _ in texts))
    assert ended == ["filler", "urgent", "normal", "normal too", "late"]


def test_deadline_ends_a_running_sequence(backend: Backend) -> None:
    submit(backend, ask(PROMPT, "late", max_tokens=500, ignore_eos=True, deadline_s=0.2), ask(PROMPT, max_tokens=4))
    texts: Texts = {}
    collect(backend.step(), texts)
    time.sleep(0.2)  # what is tested is that time passes
    finish(backend, texts)
    assert texts["late", 0].finish_reason is FinishReason.DEADLINE
    assert texts["late", 0].last.new_token_ids == []
    assert texts["a", 0].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_deadline_ends_a_waiting_sequence(backend: Backend) -> None:
    submit(backend, ask(PROMPT, "filler", n=MAX_NUM_SEQS, max_tokens=400, ignore_eos=True))
    step_until_running(backend, MAX_NUM_SEQS, {})
    submit(backend, ask(PROMPT, "late", n=2, deadline_s=0.0))
    outputs = [output for output in backend.step() if output.request_id == "late"]
    assert [(o.index, o.finish_reason) for o in outputs] == [(0, FinishReason.DEADLINE), (1, FinishReason.DEADLINE)]
    assert backend.stats.num_waiting == 0
    backend.abort("filler")


@pytest.mark.parametrize("prompt_size", [500, 600])
def test_too_long_is_refused_with_both_counts(backend: Backend, prompt_size: int) -> None:
    refused = refusal(backend, ask([1] * prompt_size, max_tokens=50))
    assert refused.code == "context_length_exceeded"
    for number in (MAX_POSITIONS, prompt_size + 50, prompt_size, 50):
        assert str(number) in refused.message


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE, 2**40])
def test_ids_outside_the_vocabulary_are_refused(backend: Backend, bad_id: int) -> None:
    cases = {
        "prompt": ask([1, bad_id]),
        "stop_token_ids": ask(PROMPT, stop_token_ids=(bad_id,)),
        "logit_bias": ask(PROMPT, logit_bias={bad_id: 1.0}),
        "logprob_token_ids": ask(PROMPT, logprob_token_ids=(bad_id,)),
    }
    for param, request in cases.items():
        refused = refusal(backend, request)
        assert (refused.code, refused.param) == ("invalid_request", param)
        assert str(bad_id) in refused.message


def test_empty_prompt_is_refused(backend: Backend) -> None:
    assert refusal(backend, ask([])).param == "prompt"


@pytest.mark.parametrize("param", ["logprobs", "prompt_logprobs"])
def test_too_many_logprobs_are_refused(backend: Backend, param: str) -> None:
    backend.check(ask(PROMPT, **{param: 20}))
    refused = refusal(backend, ask(PROMPT, **{param: 21}))
    assert (refused.code, refused.param) == ("invalid_request", param)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bias_must_be_finite(backend: Backend, value: float) -> None:
    assert refusal(backend, ask(PROMPT, logit_bias={1: value})).param == "logit_bias"


def test_adapter_load_use_unload(backend: Backend, adapter_folder: Path) -> None:
    info = adapter_info("friend")
    base = free_run(backend)
    assert refusal(backend, ask(PROMPT, adapter=info.id)).code == "model_not_found"
    for _ in range(2):
        backend.load_adapter(info, adapter_folder)
        adapted = ask(PROMPT, "adapted", adapter=info.id, max_tokens=12, ignore_eos=True)
        texts = run(backend, adapted, ask(PROMPT, "base", max_tokens=12, ignore_eos=True))
        assert texts["base", 0].token_ids == base
        assert texts["adapted", 0].token_ids != base
        backend.unload_adapter(info.id)
        assert refusal(backend, ask(PROMPT, adapter=info.id)).code == "model_not_found"
    assert free_run(backend) == base
    backend.unload_adapter(info.id)  # unknown by now: ignored


def test_bad_adapter_is_refused_and_work_goes_on(backend: Backend, tmp_path: Path) -> None:
    base = free_run(backend)
    submit(backend, ask(PROMPT, max_tokens=12, ignore_eos=True))
    texts: Texts = {}
    collect(backend.step(), texts)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        backend.load_adapter(adapter_info("bad"), tmp_path)
    assert refusal(backend, ask(PROMPT, adapter=adapter_info("bad").id)).code == "model_not_found"
    text: Text = finish(backend, texts)["a", 0]
    assert text.token_ids == base


def test_step_without_work_returns_nothing(backend: Backend) -> None:
    assert not backend.has_work
    assert backend.step() == []
