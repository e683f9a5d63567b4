"""The KV store and its scheduler: bounded memory, no holes, no strangers' numbers."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.backends.hf import HfBackend, HfOptions, backend
from server.engine.backends.hf.kv_cache import KvShape, SlotCache
from server.engine.backends.hf.scheduler import Scheduler
from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import FinishReason, Generate, SamplingParams
from tests.server.engine.backends.driver import Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.folders import write_adapter, write_model

BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
MAX_CELLS = 600


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Iterator[HfBackend]:
    """Room for 600 tokens in all, 8 sequences, 32 prompt tokens a step."""
    made = HfBackend(
        HfOptions(
            model_folder, "tiny", kv_cache_gib=MAX_CELLS * BYTES_PER_TOKEN / 2**30, max_num_seqs=8, prefill_chunk=32
        )
    )
    made.load()
    yield made
    made.close()


def assert_rows_are_sound(made: HfBackend) -> None:
    """Within the bound, and every cell that no live sequence wrote is zero."""
    cache, live = made._cache, made._scheduler.live
    assert cache.num_rows * cache.capacity <= MAX_CELLS
    assert cache.num_rows >= len(live)
    for layer in cache._slots:
        assert layer.keys.shape[0] == cache.num_rows and layer.keys.shape[2] == cache.capacity
        for row in range(cache.num_rows):
            used = live[row].num_cached if row < len(live) else 0
            assert not layer.keys[row, :, used:].any() and not layer.values[row, :, used:].any()


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_every_text_and_the_bound(small: HfBackend, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        ask(
            [rng.randrange(250) for _ in range(rng.choice([1, 5, 30, 31, 32, 33, 90, 200]))],
            str(i),
            max_tokens=rng.choice([1, 3, 20, 60]),
            n=rng.choice([1, 1, 2, 4]),
            priority=rng.choice([0, 0, -1]),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            ignore_eos=True,
        )
        for i in range(10)
    ]
    alone: Texts = {}
    for request in requests:
        alone |= run(small, request)
    together: Texts = {}
    aborted = rng.sample(range(10), 3)
    for i, request in enumerate(requests):
        submit(small, request)
        for _ in range(rng.choice([0, 1, 4])):
            collect(small.step(), together)
            assert_rows_are_sound(small)
        if i in aborted:
            small.abort(str(i))
    while small.has_work:
        collect(small.step(), together)
        assert_rows_are_sound(small)
    for key, text in alone.items():
        got = together[key].token_ids if key in together else []
        assert got == (text.token_ids[: len(got)] if int(key[0]) in aborted else text.token_ids), key


def test_sequences_wait_for_memory_not_only_for_rows(small: HfBackend) -> None:
    submit(small, *(ask([1] * 200, str(i), max_tokens=50, ignore_eos=True) for i in range(4)))
    most, texts = 0, {}
    while small.has_work:
        collect(small.step(), texts)
        most = max(most, small.stats.num_running)
        assert small.stats.kv_tokens_used <= small.stats.kv_tokens_total == MAX_CELLS
    assert most == 2  # 2 x 250 fit into 600, 3 do not
    assert all(len(text.token_ids) == 50 for text in texts.values())


def test_a_step_computes_no_more_prompt_than_the_chunk(small: HfBackend) -> None:
    submit(small, ask([1] * 200, "long", max_tokens=2), *(ask([2] * 20, str(i), max_tokens=2) for i in range(4)))
    texts: Texts = {}
    while small.has_work:
        before = small.stats.prompt_tokens_total
        collect(small.step(), texts)
        assert small.stats.prompt_tokens_total - before <= 32


def test_decoding_goes_on_while_a_long_prompt_is_read(small: HfBackend) -> None:
    submit(small, ask([3, 4], "talker", max_tokens=30, ignore_eos=True))
    texts: Texts = {}
    collect(small.step(), texts)
    submit(small, ask([5] * 200, "reader", max_tokens=1))
    for expected in range(2, 7):
        collect(small.step(), texts)
        assert len(texts["talker", 0].token_ids) == expected
    assert ("reader", 0) not in texts
    finish(small, texts)


def test_choices_share_one_prefill(small: HfBackend) -> None:
    before = small.stats.prompt_tokens_total
    run(small, ask([1] * 30, n=4, max_tokens=2, temperature=1.0))
    assert small.stats.prompt_tokens_total - before == 30


def test_idle_store_goes_back(small: HfBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small, ask([1] * 30, max_tokens=2))
    assert small._cache.num_bytes > 0  # small enough to keep
    monkeypatch.setattr(backend, "IDLE_BYTES", 0)
    submit(small, ask([1] * 30, max_tokens=20, ignore_eos=True))
    small.step()
    small.abort("a")
    assert small._cache.num_bytes == 0


def test_nan_ends_its_own_sequence_and_leaves_nothing_behind(
    small: HfBackend, model_folder: Path, tmp_path: Path
) -> None:
    """An adapter that overflows: its sequence errs, batch mates and the row's next user do not notice."""
    small.load_adapter(adapter_info("wild"), write_adapter(tmp_path, model_folder, scale=1e36))
    requests = [ask([9, 8, 7 + i], str(i), max_tokens=20, ignore_eos=True) for i in range(3)]
    alone = [run(small, request)[str(i), 0].token_ids for i, request in enumerate(requests)]
    texts: Texts = {}
    submit(small, requests[0])
    collect(small.step(), texts)
    wild = ask([1] * 40, "wild", adapter=adapter_info("wild").id, max_tokens=20, ignore_eos=True)
    submit(small, wild, *requests[1:])
    while small.has_work:
        collect(small.step(), texts)
        assert_rows_are_sound(small)
    assert texts["wild", 0].finish_reason is FinishReason.ERROR
    assert "not a number" in (texts["wild", 0].last.error or "")
    assert [texts[str(i), 0].token_ids for i in range(3)] == alone
    small.unload_adapter(adapter_info("wild").id)


def sequence(reservation: int, priority: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=1)
    return Sequence(Generate(request_id="a", prompt_token_ids=[0] * (reservation - 1), params=params), 0, frozenset())


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(2, 40)), max_size=60))
@settings(deadline=None)
def test_rows_have_no_holes_whatever_comes_and_goes(events: list[tuple[int, int]]) -> None:
    """A model of the cache: after each event, cell row i must belong to live sequence i."""
    scheduler, rows = Scheduler(max_num_seqs=5, max_cells=100), list[Sequence | None]([None] * 5)
    for action, size in events:
        if action <= 6:
            scheduler.add(sequence(size))
        elif action <= 9 and (started := scheduler.next_prefill()) is not None:
            rows[scheduler.row_of(started)] = started
            if action <= 8:
                scheduler.finish_prefill()
        elif scheduler.live:
            leaver = scheduler.live[size % len(scheduler.live)]
            for source, target, _ in scheduler.remove(leaver):
                rows[target] = rows[source]
        live = scheduler.live
        assert rows[: len(live)] == live
        assert len(live) * max((s.reservation for s in live), default=0) <= 100 and len(live) <= 5


def test_store_grows_geometrically_and_keeps_what_was_written() -> None:
    shape = KvShape(1, 1, 2, torch.float32, torch.device("cpu"))
    cache = SlotCache(shape, max_rows=8, max_cells=2000)
    sizes = []
    for length in range(1, 200):
        cache.reserve(1, length, 500)
        cache._slots[0].keys[0, 0, length - 1] = length
        sizes.append(cache.capacity)
    assert len(set(sizes)) <= 4
    assert cache._slots[0].keys[0, 0, :199, 0].tolist() == list(range(1, 200))
    cache.reserve(8, 200, 250)
    assert (cache.num_rows, cache.capacity) == (8, 250)
    assert cache._slots[0].keys[0, 0, :199, 0].tolist() == list(range(1, 200))
