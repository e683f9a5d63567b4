"""KV memory and the scheduler: bounded, shared where texts begin alike, given back, no strangers' numbers."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.backends.base import AdapterError, RequestRefused
from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.backends.hf.kv_store import KvShape, KvStore
from server.engine.backends.hf.rows import SMALLEST_MATCH, KvRows
from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import FinishReason, Generate, SamplingParams
from tests.server.engine.backends.driver import Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.folders import write_adapter

PAGE = 64  # cells: head size 16 in float32
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
MAX_CELLS = 10 * PAGE
LONG = [(7 * i) % 251 for i in range(100)]


def start(model_folder: Path, **options: object) -> HfBackend:
    sizes: dict[str, object] = {"max_num_seqs": 8, "prefill_chunk": 32} | options
    made = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=MAX_CELLS * BYTES_PER_TOKEN / 2**30, **sizes))  # type: ignore[arg-type]
    made.load()
    return made


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[HfBackend]:
    made = start(model_folder)
    yield made
    made.close()


@pytest.fixture
def small(shared: HfBackend) -> HfBackend:
    """Room for 640 tokens in all, 8 sequences, 32 prompt tokens a step; nothing kept from earlier tests."""
    forget_kept(shared)
    return shared


def forget_kept(made: HfBackend) -> None:
    """Free every row that a finished sequence has left behind."""
    for row in made._rows._kept():
        made._rows._free(row)


def assert_rows_are_sound(made: HfBackend) -> None:
    """Within the bound, counted right, and nothing written outside of what is counted."""
    rows, store = made._rows, made._store
    assert rows.used_cells == sum(row.held for row in rows._rows) <= MAX_CELLS
    owners = [row.owner for row in rows._rows if row.owner is not None]
    assert rows.num_live == len(owners) == len(made._scheduler.running)
    for row in rows._rows:
        assert row.owner is None or (row.owner.row == row.index and row.owner.num_cached <= row.held)
        for layer in range(2):
            assert not store.keys[layer][row.index, :, row.held :].any()


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


def test_when_memory_runs_out_the_last_one_starts_again_and_loses_nothing(small: HfBackend) -> None:
    requests = [
        ask([i, *LONG], str(i), max_tokens=100, ignore_eos=True, temperature=1.0, seed=i, logprobs=1) for i in range(4)
    ]
    alone = [run(small, request)[str(i), 0] for i, request in enumerate(requests)]
    before, texts = small.stats.num_preempted, {}
    submit(small, *requests)
    while small.has_work:
        collect(small.step(), texts)
        assert_rows_are_sound(small)
    assert small.stats.num_preempted > before
    for i, text in enumerate(alone):
        assert texts[str(i), 0].token_ids == text.token_ids
        assert len(texts[str(i), 0].logprobs) == 100


def test_the_first_to_come_is_never_sent_back(small: HfBackend) -> None:
    submit(small, *(ask([i, *LONG], str(i), max_tokens=150, ignore_eos=True) for i in range(4)))
    texts: Texts = {}
    produced = 0
    while ("0", 0) not in texts or texts["0", 0].finish_reason is None:
        collect(small.step(), texts)
        if ("0", 0) in texts and produced:
            assert len(texts["0", 0].token_ids) == produced + 1
        produced = len(texts["0", 0].token_ids) if ("0", 0) in texts else 0
    finish(small, texts)


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


def test_the_next_turn_computes_only_what_is_new(small: HfBackend) -> None:
    first = run(small, ask(LONG, max_tokens=20, ignore_eos=True))["a", 0].token_ids
    before = small.stats.prompt_tokens_total
    second = [*LONG, *first, 9, 8, 7]
    text = run(small, ask(second, "b", max_tokens=10, ignore_eos=True))["b", 0]
    assert text.outputs[0].num_cached_tokens == len(LONG) + 19  # the last token was chosen, but never computed
    assert small.stats.prompt_tokens_total - before == 4
    forget_kept(small)
    assert run(small, ask(second, "c", max_tokens=10, ignore_eos=True))["c", 0].token_ids == text.token_ids


def test_one_kept_text_serves_two_branches(small: HfBackend) -> None:
    run(small, ask(LONG, max_tokens=1))
    branches = [ask([*LONG[:60], i, i], str(i), max_tokens=10, ignore_eos=True) for i in range(3)]
    texts = run(small, *branches)
    assert [texts[str(i), 0].outputs[0].num_cached_tokens for i in range(3)] == [60, 60, 60]
    forget_kept(small)
    for i, branch in enumerate(branches):
        assert run(small, branch)[str(i), 0].token_ids == texts[str(i), 0].token_ids
        forget_kept(small)


@pytest.mark.parametrize("other", [{"cache_salt": "another tenant"}, {"adapter": adapter_info("x").id}, {}])
def test_prefixes_are_not_shared_across_tenants_or_adapters(
    small: HfBackend, model_folder: Path, tmp_path: Path, other: dict[str, str]
) -> None:
    small.load_adapter(adapter_info("x"), write_adapter(tmp_path, model_folder))
    run(small, ask(LONG, max_tokens=1))
    text = run(small, ask(LONG, "b", max_tokens=1, **other))["b", 0]
    assert text.outputs[0].num_cached_tokens == (0 if other else len(LONG) - 1)
    small.unload_adapter(adapter_info("x").id)


def test_an_unloaded_adapter_leaves_no_cells(small: HfBackend, model_folder: Path, tmp_path: Path) -> None:
    small.load_adapter(adapter_info("x"), write_adapter(tmp_path, model_folder))
    run(small, ask(LONG, max_tokens=1, adapter=adapter_info("x").id))
    assert small._rows.used_cells > 0
    small.unload_adapter(adapter_info("x").id)
    assert small._rows.used_cells == 0


def test_scored_prompts_are_computed_whole(small: HfBackend) -> None:
    run(small, ask(LONG, max_tokens=1))
    text = run(small, ask(LONG, "b", max_tokens=1, prompt_logprobs=1))["b", 0]
    assert text.outputs[0].num_cached_tokens == 0
    assert text.prompt_logprobs is not None and len(text.prompt_logprobs) == len(LONG)


def test_without_prefix_cache_nothing_is_kept(model_folder: Path) -> None:
    made = start(model_folder, prefix_cache=False)
    run(made, ask(LONG, max_tokens=1))
    assert made._rows.used_cells == 0
    assert run(made, ask(LONG, "b", max_tokens=1))["b", 0].outputs[0].num_cached_tokens == 0
    made.close()


def test_kept_texts_go_when_room_is_needed_the_oldest_first(small: HfBackend) -> None:
    for i in range(6):
        run(small, ask([i, *LONG], str(i), max_tokens=1))
    assert small._rows.used_cells <= MAX_CELLS
    reused = [run(small, ask([i, *LONG], "x", max_tokens=1))["x", 0].outputs[0].num_cached_tokens for i in (5, 0)]
    assert reused[0] == len(LONG) and reused[1] == 0


def test_out_of_memory_fails_the_largest_and_nobody_else(small: HfBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask([3, 4, i], str(i), max_tokens=8, ignore_eos=True) for i in range(2)]
    alone = [run(small, request)[str(i), 0].token_ids for i, request in enumerate(requests)]
    texts: Texts = {}
    submit(small, *requests)
    collect(small.step(), texts)
    submit(small, ask(LONG, "large", max_tokens=8))
    forward = small._network.forward

    def scarce(batch: object) -> torch.Tensor:
        if len(batch.token_ids) > 10:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("no more")
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(small._network, "forward", scarce)
    finish(small, texts)
    assert texts["large", 0].finish_reason is FinishReason.ERROR
    assert "ran out of memory" in (texts["large", 0].last.error or "")
    assert [texts[str(i), 0].token_ids for i in range(2)] == alone


def test_out_of_memory_in_a_beam_search_fails_all_of_its_choices(
    small: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(batch: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(small._network, "forward", scarce)
    texts = run(small, ask(LONG[:20], max_tokens=20, num_beams=4, n=3))
    assert {key: text.finish_reason for key, text in texts.items()} == {("a", i): FinishReason.ERROR for i in range(3)}
    assert small._rows.num_live == 0


def test_an_adapter_that_does_not_fit_is_refused_and_the_engine_goes_on(
    small: HfBackend, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    folder, info = write_adapter(tmp_path / "large", model_folder), adapter_info("large")
    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="does not fit into this engine's memory"):
        patch.setattr(small._adapters, "attach", scarce)
        small.load_adapter(info, folder)
    small.load_adapter(info, folder)
    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="does not fit into this engine's memory"):
        patch.setattr(small._network, "forward", scarce)
        small.probe_adapter(info.id)
    small.unload_adapter(info.id)


def test_a_prompt_that_fills_the_context_leaves_its_neighbours_alone(model_folder: Path) -> None:
    """It has no next token: no page beyond its row is reserved, nor cleared when it goes."""
    made = start(model_folder, max_model_len=2 * PAGE)
    full = [(3 * i) % 251 for i in range(2 * PAGE)]
    stream = ask([5, 6, 7], "stream", max_tokens=40, ignore_eos=True, logprobs=0)
    alone = run(made, stream)["stream", 0]
    forget_kept(made)
    submit(made, ask(full, "full", max_tokens=0), stream)
    beside = finish(made)["stream", 0]
    assert all(row.held <= made._store.capacity for row in made._rows._rows)
    assert beside.token_ids == alone.token_ids
    expected = [entry.logprob for entry in alone.logprobs]
    assert [entry.logprob for entry in beside.logprobs] == pytest.approx(expected, abs=1e-4)
    again = run(made, ask(full, "again", max_tokens=0))["again", 0]
    assert again.finish_reason is FinishReason.LENGTH
    made.close()


def test_a_prompt_that_fills_the_context_fits_where_the_memory_is_the_context(model_folder: Path) -> None:
    size = 2 * PAGE
    made = HfBackend(HfOptions(model_folder, "tiny", kv_cache_gib=size * BYTES_PER_TOKEN / 2**30, max_model_len=size))
    made.load()
    text = run(made, ask([(3 * i) % 251 for i in range(size)], max_tokens=0))["a", 0]
    assert text.finish_reason is FinishReason.LENGTH
    made.close()


def test_beams_take_their_memory_first_and_give_it_back(small: HfBackend) -> None:
    with pytest.raises(RequestRefused, match="beams of"):
        small.check(ask(LONG, max_tokens=200, num_beams=5))
    beams = ask(LONG[:20], "beams", max_tokens=20, num_beams=4, n=4, ignore_eos=True)
    expected = run(small, beams)
    texts: Texts = {}
    submit(small, *(ask([i, *LONG], str(i), max_tokens=60, ignore_eos=True) for i in range(2)), beams)
    while small.has_work:
        collect(small.step(), texts)
        assert small._rows.used_cells <= MAX_CELLS
    assert [texts["beams", i].token_ids for i in range(4)] == [expected["beams", i].token_ids for i in range(4)]
    submit(small, beams)
    small.step()
    small.abort("beams")
    assert not small.has_work and small._rows.num_live == 0


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


SHAPE = KvShape(1, 1, 16, torch.float32, torch.device("cpu"))


def sequence(tokens: list[int], salt: str = "") -> Sequence:
    return Sequence(
        Generate(request_id="a", prompt_token_ids=tokens, params=SamplingParams(), cache_salt=salt), 0, frozenset()
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 150)), max_size=40))
@settings(deadline=None, max_examples=60)
def test_rows_hold_what_their_sequences_believe(events: list[tuple[int, int, int]]) -> None:
    """Each cell is marked with its token: after any coming and going a row begins with its sequence's text."""
    store = KvStore(SHAPE, 5, 256)
    rows, live = KvRows(store, 5, 6 * PAGE, 4, keeps_prefixes=True), list[Sequence]()
    for action, family, size in events:
        if action <= 5:
            new = sequence([family * 1000 + i for i in range(size)], salt="" if action < 5 else "other")
            if rows.admit([new]):
                live.append(new)
                assert store.keys[0][new.row, 0, : new.num_cached, 0].tolist() == new.tokens[: new.num_cached]
                assert new.num_cached < len(new.tokens)
                store.keys[0][new.row, 0, : len(new.tokens), 0] = torch.tensor(new.tokens, dtype=torch.float32)
                new.num_cached = len(new.tokens)
        elif live:
            leaver = live.pop(size % len(live))
            if action == 6 and rows.grow(leaver, leaver.num_cached + PAGE):
                live.append(leaver)
            else:
                rows.release(leaver, keep=action < 9)
        assert rows.used_cells == sum(row.held for row in rows._rows) <= 6 * PAGE
        for one in live:
            assert store.keys[0][one.row, 0, : one.num_cached, 0].tolist() == one.tokens


def test_short_prefixes_are_computed_again() -> None:
    rows = KvRows(KvStore(SHAPE, 4, 256), 4, 6 * PAGE, 4, keeps_prefixes=True)
    for length in (SMALLEST_MATCH, SMALLEST_MATCH + 1):
        first = sequence(list(range(length)))
        assert rows.admit([first])
        first.num_cached = length
        rows.release(first, keep=True)
    again = sequence([*range(SMALLEST_MATCH), 99, 98])
    assert rows.admit([again]) and again.num_cached == SMALLEST_MATCH
    other = sequence([*range(SMALLEST_MATCH - 1), 99, 98])
    assert rows.admit([other]) and other.num_cached == 0


def test_trimming_gives_memory_back() -> None:
    store = KvStore(KvShape(4, 2, 64, torch.float32, torch.device("cpu")), 4, 65536)
    before = resident_mib()
    for layer in range(4):
        store.keys[layer][1] = 1.0
    assert resident_mib() - before > 100  # 4 layers x 2 heads x 65,536 cells x 256 bytes
    store.trim(1, 100, 65536)
    assert resident_mib() - before < 10
    assert store.keys[0][1, 0, :, 0].nonzero().max() == 99


def resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
