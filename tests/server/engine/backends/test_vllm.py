"""The vllm backend on the real vLLM, one engine for most of it: what the contract test of all backends does not ask."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from server.engine.backends.base import AdapterError, RequestRefused
from server.engine.backends.vllm import VllmBackend
from server.engine.messages import FinishReason
from server.errors import ConfigError
from tests.server.engine.backends.driver import (
    Texts,
    adapter_info,
    ask,
    collect,
    finish,
    run,
    step_until_running,
    submit,
)
from tests.server.engine.backends.folders import MAX_POSITIONS, greedy_with_gaps, write_adapter
from tests.server.engine.backends.folders import assert_agrees as assert_same_text
from tests.server.engine.backends.vllm_matrix import ENGINES, SHAPES, run_family
from tests.server.engine.backends.vllm_setup import VLLM, tiny_options, write_model_for_vllm

pytestmark = VLLM

PROMPT = [10, 20, 30, 40, 50]
LONG_PROMPT = [(37 * i + 5) % 250 for i in range(100)]
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_for_vllm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), model_folder)


@pytest.fixture(scope="module")
def backend(model_folder: Path) -> Iterator[VllmBackend]:
    backend = VllmBackend(tiny_options(model_folder, max_lora_rank=8, max_loras=2, more={"block_size": BLOCK_SIZE}))
    backend.load()
    yield backend
    backend.close()


def free_run(backend: VllmBackend, adapter: str | None = None) -> list[int]:
    return run(backend, ask(PROMPT, max_tokens=12, ignore_eos=True, adapter=adapter))["a", 0].token_ids


def refusal(backend: VllmBackend, folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        backend.load_adapter(adapter_info("bad"), folder)
    assert "bad@" not in str(backend.stats)
    return str(caught.value)


def changed_config(source: Path, target: Path, **options: object) -> Path:
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **options}), encoding="utf-8")
    return target


def test_prefixes_are_shared_within_a_salt_only(backend: VllmBackend) -> None:
    def cached(salt: str) -> int:
        text = run(backend, ask(LONG_PROMPT, max_tokens=1, cache_salt=salt))["a", 0]
        return text.outputs[0].num_cached_tokens or 0

    assert cached("one tenant") == 0
    assert cached("one tenant") == len(LONG_PROMPT) // BLOCK_SIZE * BLOCK_SIZE
    assert cached("another") == 0


def test_text_is_that_of_transformers(backend: VllmBackend, model_folder: Path, adapter_folder: Path) -> None:
    info = adapter_info("friend")
    backend.load_adapter(info, adapter_folder)
    backend.probe_adapter(info.id)
    texts = run(
        backend,
        *(ask(PROMPT, f"base {i}", max_tokens=12, ignore_eos=True) for i in range(2)),
        ask(PROMPT, "adapted", max_tokens=12, ignore_eos=True, adapter=info.id),
    )
    for i in range(2):
        assert_same_text(texts[f"base {i}", 0].token_ids, greedy_with_gaps(model_folder, PROMPT, 12))
    assert_same_text(texts["adapted", 0].token_ids, greedy_with_gaps(model_folder, PROMPT, 12, adapter_folder))
    backend.unload_adapter(info.id)


def test_new_weights_under_an_old_id_are_never_stale(backend: VllmBackend, model_folder: Path, tmp_path: Path) -> None:
    """Also not from the prefix cache: the prompt fills whole blocks, and the third folder is the first one again."""
    folders = [write_adapter(tmp_path / str(seed), model_folder, seed=seed) for seed in (1, 2)]
    seen = []
    for folder in (*folders, folders[0]):
        info = adapter_info("friend")
        backend.load_adapter(info, folder)
        text = run(backend, ask(LONG_PROMPT, max_tokens=8, ignore_eos=True, adapter=info.id))["a", 0]
        assert text.outputs[0].num_cached_tokens == 0
        seen.append(text.token_ids)
        backend.unload_adapter(info.id)
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "merge it into the base model"),
        ({"modules_to_save": ["lm_head"]}, "merge it into the base model"),
        ({"peft_type": "IA3"}, "QLOOP_ENGINE=hf"),
        ({"r": 32}, "QLOOP_MAX_ADAPTER_RANK=32"),
        ({"rank_pattern": {"q_proj": 16}}, "QLOOP_MAX_ADAPTER_RANK=16"),
        ({"r": 1024}, "QLOOP_ENGINE=hf"),
        ({"r": 2}, "another base model"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_cure(
    backend: VllmBackend, adapter_folder: Path, tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    assert reason in refusal(backend, changed_config(adapter_folder, tmp_path / "bad", **options))


def test_broken_files_are_refused_and_running_text_goes_on(
    backend: VllmBackend, adapter_folder: Path, tmp_path: Path
) -> None:
    base = free_run(backend)
    submit(backend, ask(PROMPT, max_tokens=12, ignore_eos=True))
    texts: Texts = {}
    collect(backend.step(), texts)
    weights = "adapter_model.safetensors"
    cut = changed_config(adapter_folder, tmp_path / "cut")
    (cut / weights).write_bytes((cut / weights).read_bytes()[:-100])
    pickled = changed_config(adapter_folder, tmp_path / "pickled")
    (pickled / weights).rename(pickled / "adapter_model.bin")
    lacking = changed_config(adapter_folder, tmp_path / "lacking")
    tensors = load_file(lacking / weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, lacking / weights)
    assert "cut short" in refusal(backend, cut)
    assert "never read" in refusal(backend, pickled)
    assert "has only lora_" in refusal(backend, lacking)
    assert finish(backend, texts)["a", 0].token_ids == base


def test_the_base_is_itself_beside_as_many_adapters_as_fit(
    backend: VllmBackend, model_folder: Path, tmp_path: Path
) -> None:
    infos = [adapter_info(f"full-{seed}") for seed in range(2)]
    alone = [free_run(backend)]
    for seed, info in enumerate(infos):
        backend.load_adapter(info, write_adapter(tmp_path / str(seed), model_folder, seed=seed + 1))
        alone.append(free_run(backend, info.id))
    assert len({tuple(ids) for ids in alone}) == 3
    users = [None, *(info.id for info in infos)]
    asks = [ask(PROMPT, f"{i}", max_tokens=12, ignore_eos=True, adapter=users[i % 3]) for i in range(6)]
    texts = run(backend, *asks)
    assert [texts[str(i), 0].token_ids for i in range(6)] == alone * 2
    for info in infos:
        backend.unload_adapter(info.id)


def test_metrics_do_not_grow_with_the_adapters_that_were(
    backend: VllmBackend, model_folder: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "guest", model_folder, seed=1)
    for info in [adapter_info(f"guest-{i}") for i in range(3)]:
        backend.load_adapter(info, folder)
        free_run(backend, info.id)
        backend.unload_adapter(info.id)
    lines = backend.metrics().splitlines()
    assert len([line for line in lines if line.startswith("vllm:lora_requests_info{")]) == 1
    assert [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
    assert not [line for line in lines if not line.startswith(("#", "vllm:"))]


def test_prompt_without_room_for_a_token_is_refused(backend: VllmBackend) -> None:
    with pytest.raises(RequestRefused) as caught:
        backend.check(ask([1] * MAX_POSITIONS, max_tokens=0))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logprob_token_ids": (1,), "max_tokens": 17}, "logprob_token_ids"),
        ({"min_tokens": 9, "max_tokens": 4}, None),
        ({"num_beams": 2}, "num_beams"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
    ],
)
def test_parameters_that_vllm_lacks_are_refused(
    backend: VllmBackend, params: dict[str, object], param: str | None
) -> None:
    with pytest.raises(RequestRefused) as caught:
        backend.check(ask(PROMPT, **params))
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)


def test_given_ids_leave_other_requests_logprobs_alone(backend: VllmBackend) -> None:
    alone = run(backend, ask(PROMPT, max_tokens=3, ignore_eos=True, logprobs=4))["a", 0].logprobs
    texts = run(
        backend,
        ask(PROMPT, max_tokens=3, ignore_eos=True, logprobs=4),
        ask(PROMPT, "scored", max_tokens=3, ignore_eos=True, logprob_token_ids=(7, 8, 9)),
    )
    assert [entry.top_token_ids for entry in texts["a", 0].logprobs] == [entry.top_token_ids for entry in alone]
    assert all(len(entry.given_logprobs) == 3 for entry in texts["scored", 0].logprobs)


def test_an_abort_takes_back_what_has_just_finished(backend: VllmBackend, adapter_folder: Path) -> None:
    """vLLM's loop runs in every call, so a sequence may end between two steps."""
    info = adapter_info("meanwhile")
    backend.load_adapter(info, adapter_folder)
    submit(backend, ask(PROMPT, "over", n=2, max_tokens=1, ignore_eos=True))
    while backend.stats.num_running + backend.stats.num_waiting:
        backend.probe_adapter(info.id)
    assert backend.has_work
    backend.abort("over", 1)
    assert [(output.request_id, output.index) for output in backend.step()] == [("over", 0)]
    submit(backend, ask(PROMPT, "over", max_tokens=1, ignore_eos=True))
    while backend.stats.num_running + backend.stats.num_waiting:
        backend.probe_adapter(info.id)
    backend.abort("over")
    assert backend.step() == [] and not backend.has_work
    backend.unload_adapter(info.id)


def test_a_probe_waits_for_a_slot_while_answers_go_on(backend: VllmBackend, adapter_folder: Path) -> None:
    num_tokens = MAX_POSITIONS - len(PROMPT)
    at_once = backend.model.max_num_seqs
    submit(backend, *(ask(PROMPT, str(i), n=at_once, max_tokens=num_tokens, ignore_eos=True) for i in range(2)))
    texts: Texts = {}
    step_until_running(backend, at_once, texts)
    info = adapter_info("patient")
    backend.load_adapter(info, adapter_folder)
    num_looks = 1
    while not backend.probe_adapter(info.id):
        num_looks += 1
        collect(backend.step(), texts)
    assert num_looks > 2
    assert sum(text.finish_reason is not None for text in texts.values()) <= at_once, "it waited for the queue, too"
    finish(backend, texts)
    assert {len(text.token_ids) for text in texts.values()} == {num_tokens}
    backend.unload_adapter(info.id)


def test_unloading_ends_a_probe(backend: VllmBackend, adapter_folder: Path) -> None:
    submit(backend, ask(PROMPT, n=backend.model.max_num_seqs, max_tokens=300, ignore_eos=True))
    texts: Texts = {}
    step_until_running(backend, backend.model.max_num_seqs, texts)
    info = adapter_info("gone")
    backend.load_adapter(info, adapter_folder)
    assert not backend.probe_adapter(info.id)
    backend.unload_adapter(info.id)
    assert {len(text.token_ids) for text in finish(backend, texts).values()} == {300}
    assert free_run(backend) == free_run(backend)


def test_what_vllm_refuses_late_is_a_refusal(backend: VllmBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a speculative model: vLLM checks that against a request only when it takes it, by an error of its own."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    take, calls = AsyncLLM.add_request, []

    async def take_one(self: AsyncLLM, *arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) > 1:
            raise VLLMValidationError("min_p is not supported here", parameter="min_p")
        return await take(self, *arguments, **options)

    monkeypatch.setattr(AsyncLLM, "add_request", take_one)
    with pytest.raises(RequestRefused, match="min_p is not supported"):
        submit(backend, ask(PROMPT, n=2, max_tokens=4))
    assert len(calls) == 2 and not backend.has_work
    monkeypatch.undo()
    assert finish(backend) == {} and len(free_run(backend)) == 12


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"min_tokens": 1, "stop_token_ids": tuple(range(129))}, "stop_token_ids"),
    ],
)
def test_what_would_end_the_engine_core_on_a_gpu_is_refused(
    parameters: dict[str, object], param: str, backend: VllmBackend
) -> None:
    with pytest.raises(RequestRefused) as caught:
        backend.check(ask(PROMPT, max_tokens=4, **parameters))
    assert caught.value.param == param


@pytest.mark.parametrize(("seed", "index", "expected"), [(7, 1, 8), (2**63 - 1, 1, -(2**63)), (-2, 1, 2**63 - 1)])
def test_seeds_stay_numbers_of_64_bits_that_mean_a_seed(
    seed: int, index: int, expected: int, backend: VllmBackend
) -> None:
    from server.engine.backends.vllm.sampling import vllm_params

    assert vllm_params(ask(PROMPT, seed=seed), index, backend.model).seed == expected


def test_batches_are_as_large_as_those_of_vllms_own_server(model_folder: Path) -> None:
    """vLLM's defaults depend on who asks; for two devices they differ on CPUs, too."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from server.engine.backends.vllm.arguments import engine_config

    scheduler = engine_config(tiny_options(model_folder, tensor_parallel_size=2, max_num_seqs=None)).scheduler_config
    tokens, sequences = AsyncEngineArgs.get_batch_defaults(2)
    assert scheduler.max_num_batched_tokens == tokens[UsageContext.OPENAI_API_SERVER] == 4096
    assert scheduler.max_num_seqs == sequences[UsageContext.OPENAI_API_SERVER]


def test_max_tokens_zero_counts_no_token(backend: VllmBackend) -> None:
    before = backend.stats.generated_tokens_total
    text = run(backend, ask(PROMPT, max_tokens=0))["a", 0]
    assert (text.token_ids, text.finish_reason) == ([], FinishReason.LENGTH)
    assert backend.stats.generated_tokens_total == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"block_sise": 32}, "did you mean 'block_size'"),
        ({"max_num_seqs": 4}, "QLOOP_MAX_NUM_SEQS"),
        ({"nonsense": 1}, "no engine argument 'nonsense'"),
        ({"load_format": "pt"}, "safetensors"),
    ],
)
def test_unknown_and_owned_arguments_are_refused(more: dict[str, object], message: str, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        VllmBackend(tiny_options(model_folder, more=more)).load()


def test_both_engines_agree_with_transformers_and_peft(tmp_path: Path) -> None:
    """One family of the matrix; docs/engines.md has all of them."""
    name = "Qwen2 (tied head)"
    cells = run_family(SHAPES[name], ENGINES, tmp_path)
    assert set(cells) == {"hf", "vllm"}
    assert all(cell["num_compared"] >= 0.9 * cell["num_tokens"] for row in cells.values() for cell in row.values())
