"""What the hf engine does beside plain decoding: mixed adapters, kept prefixes, a long prompt among running streams."""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import speed_model
from benchmarks.speed_systems import Engine, engine
from server.engine.messages import AdapterInfo, SequenceOutput
from server.store.card import AdapterCard
from server.store.hashes import weights_hash
from server.store.home import Home
from server.store.registry import AdapterEntry, Registry

MIXED_STREAMS, MIXED_ADAPTERS, MIXED_RANK = 8, 4, 8
LARGE_RANK = 64
MIN_MIXED_VS_BASE = 0.85
MAX_LOAD_S = 0.5
MAX_RSS_GROWTH = 0.02
CONVERSATION, ADDED = 1500, 40
MAX_SECOND_VS_FIRST = 0.2
RUNNING_STREAMS, RUNNING_TOKENS, LONG_PROMPT = 8, 1500, 3000
STEADY_TOKENS = 32
MAX_WORST_GAP = 3.0
WAIT_S = 0.002

Found = dict[str, Any]


def bar(what: str, value: float, *, least: float | None = None, most: float | None = None) -> Found:
    passed = (least is None or value >= least) and (most is None or value <= most)
    return {"what": what, "value": round(value, 4), "least": least, "most": most, "passed": passed}


def bar_line(bar: Found) -> str:
    limit = f">= {bar['least']}" if bar["least"] is not None else f"<= {bar['most']}"
    return f"{'passed' if bar['passed'] else 'MISSED'}: {bar['what']}: {bar['value']:.3g} (bar {limit})"


def table(found: Found) -> str:
    facts = [f"{name}: {value}" for name, value in found["facts"].items()]
    return "\n".join([*facts, *map(bar_line, found["bars"])])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


# --- adapters ---


async def measure_adapters(options: argparse.Namespace, model: Path) -> Found:
    """Mixed against base-only in the same engine, rounds alternating; then loading, unloading and what it leaves."""
    with tempfile.TemporaryDirectory(prefix="qb") as folder:
        home = Home(Path(folder)).create()
        publish = _Publisher(options, model, home)
        names = [publish(f"rank8-{number}", MIXED_RANK, number).id for number in range(MIXED_ADAPTERS)]
        async with engine(model, options.threads, options.work, home=home.path) as running:
            speeds = await _mixed_and_base(running, options, names)
            publish("large", LARGE_RANK, MIXED_ADAPTERS)
            publish("small", MIXED_RANK, MIXED_ADAPTERS + 1)
            cycles = await _load_cycles(running, options.cycles)
    ratio = statistics.median(speeds["mixed"]) / statistics.median(speeds["base"])
    growth = cycles["rss_mib_after"] / cycles["rss_mib_before"] - 1
    return {
        "facts": {
            "base tokens/s": _median(speeds["base"]),
            f"{MIXED_ADAPTERS} adapters mixed tokens/s": _median(speeds["mixed"]),
            **cycles,
        },
        "bars": [
            bar("mixed / base-only, 8 streams", ratio, least=MIN_MIXED_VS_BASE),
            bar(f"seconds to load rank {MIXED_RANK}, median", cycles["load_s_small"], most=MAX_LOAD_S),
            bar(f"seconds to load rank {LARGE_RANK}, median", cycles["load_s_large"], most=MAX_LOAD_S),
            bar(f"RSS growth after {options.cycles} cycles", growth, most=MAX_RSS_GROWTH),
        ],
        "rows": speeds,
    }


class _Publisher:
    """Makes adapters of the model and puts them into the registry of one home."""

    def __init__(self, options: argparse.Namespace, model: Path, home: Home) -> None:
        self._work, self._layers = options.work, options.layers
        self._registry = Registry(home.adapters)
        self._card = AdapterCard(
            base_model=model.name,
            base_weights_hash=weights_hash(model, cache_path=home.hash_cache),
            tokenizer_hash="",
            chat_template_hash="",
            default_system_prompt_hash="",
            stop_token_ids=(speed_model.EOS_ID,),
            method="lora",
            rank=0,
        )

    def __call__(self, name: str, rank: int, seed: int) -> AdapterEntry:
        folder = speed_model.write_lora(self._work / f"lora-{self._layers}-{rank}-{seed}", rank, seed, self._layers)
        return self._registry.publish(folder, name, replace(self._card, rank=rank))


async def _mixed_and_base(running: Engine, options: argparse.Namespace, names: Sequence[str]) -> dict[str, list[float]]:
    assignments = {"base": None, "mixed": [names[stream % len(names)] for stream in range(MIXED_STREAMS)]}
    speeds: dict[str, list[float]] = {kind: [] for kind in assignments}
    for number in range(options.rounds + 1):
        for place, (kind, adapters) in enumerate(assignments.items()):
            prompts = speed_model.prompts(MIXED_STREAMS, 2 * number + place)
            times = await running.run(prompts, options.tokens, adapters)
            speed = MIXED_STREAMS * options.tokens / max(stream[-1] for stream in times)
            _say(f"adapters {kind:5} {speed:7.1f} tokens/s (round {number})")
            if number:  # round 0 warms up
                speeds[kind].append(round(speed, 2))
    return speeds


async def _load_cycles(running: Engine, cycles: int) -> Found:
    """Each cycle loads, answers with, and unloads the small and the large adapter. The sizes are without them."""
    prompt = speed_model.prompts(1, 0)[0]
    await running.run([prompt], 2)
    seconds: dict[str, list[float]] = {"small": [], "large": []}
    sizes = [running.rss_mib()]
    for _ in range(cycles):
        for name, taken in seconds.items():
            begun = time.perf_counter()
            adapter: AdapterInfo = await running.client.load_adapter(name)
            taken.append(time.perf_counter() - begun)
            await running.run([prompt], 2, [adapter.id])
            await running.client.unload_adapter(name)
        sizes.append(running.rss_mib())
    _say(f"adapters RSS {sizes[0]:.0f} MiB before, {sizes[-1]:.0f} after {cycles} cycles")
    return {
        **{f"load_s_{name}": _median(taken) for name, taken in seconds.items()},
        **{f"load_s_{name}_worst": round(max(taken), 4) for name, taken in seconds.items()},
        "rss_mib_before": round(sizes[0], 1),
        "rss_mib_after_first_cycle": round(sizes[1], 1),
        "rss_mib_highest_after_a_cycle": round(max(sizes[1:]), 1),
        "rss_mib_after": round(sizes[-1], 1),
    }


# --- prefix ---


async def measure_prefix(options: argparse.Namespace, model: Path) -> Found:
    """A first turn of 1,500 tokens, then the second: the first, its answer and 40 new tokens. One chat at a time."""
    rows: list[dict[str, Any]] = []
    async with engine(model, options.threads, options.work) as running:
        for number in range(options.rounds + 1):
            rng = random.Random(number)
            prompt = speed_model.random_ids(rng, CONVERSATION)
            outputs: list[SequenceOutput] = []
            first = await running.stream(prompt, options.tokens, outputs=outputs)
            answer = [token for output in outputs for token in output.new_token_ids]
            later: list[SequenceOutput] = []
            second = await running.stream([*prompt, *answer, *speed_model.random_ids(rng, ADDED)], 2, outputs=later)
            cached = later[0].num_cached_tokens
            _say(f"prefix first {first[0]:.3f} s, second {second[0]:.3f} s, cached {cached} (round {number})")
            if number:  # round 0 warms up
                rows.append({"first_s": round(first[0], 4), "second_s": round(second[0], 4), "cached_tokens": cached})
    first_s, second_s = (statistics.median(row[key] for row in rows) for key in ("first_s", "second_s"))
    return {
        "facts": {
            "first turn, seconds to first token": first_s,
            "second turn, seconds to first token": second_s,
            "second turn, prompt tokens kept from the first": rows[-1]["cached_tokens"],
        },
        "bars": [bar("time to first token, second turn / first", second_s / first_s, most=MAX_SECOND_VS_FIRST)],
        "rows": rows,
    }


# --- prefill ---


async def measure_prefill(options: argparse.Namespace, model: Path) -> Found:
    """Gaps between the tokens of 8 running streams, before and while a prompt of 3,000 tokens is computed."""
    rows = []
    async with engine(model, options.threads, options.work) as running:
        await running.run(speed_model.prompts(RUNNING_STREAMS, 0), 4)
        for number in range(1, options.rounds + 1):
            rows.append(await _interrupt(running, number))
            _say(f"prefill {rows[-1]} (round {number})")
    medians = {key: _median([row[key] for row in rows]) for key in rows[0]}
    return {
        "facts": {f"{key}, median of {len(rows)} rounds": value for key, value in medians.items()},
        "bars": [
            bar(
                "worst gap while the long prompt is computed / median gap before it",
                _median([row["worst_gap_s"] / row["median_gap_before_s"] for row in rows]),
                most=MAX_WORST_GAP,
            )
        ],
        "rows": rows,
    }


async def _interrupt(running: Engine, number: int) -> dict[str, float]:
    times: list[list[float]] = [[] for _ in range(RUNNING_STREAMS)]
    begun = time.perf_counter()
    tasks = [
        asyncio.create_task(running.stream(prompt, RUNNING_TOKENS, begun=begun, times=stream))
        for prompt, stream in zip(speed_model.prompts(RUNNING_STREAMS, number), times, strict=True)
    ]
    try:
        await _reach(tasks, times, STEADY_TOKENS)
        arrived = time.perf_counter() - begun
        prompt = speed_model.random_ids(random.Random(number), LONG_PROMPT)
        ended = (await running.stream(prompt, 1, begun=begun))[-1]
        await _reach(tasks, times, max(map(len, times)) + 2)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    return _gaps(times, arrived, ended)


async def _reach(tasks: Sequence[asyncio.Task[list[float]]], times: Sequence[list[float]], count: int) -> None:
    """Wait until every stream has `count` tokens. A stream that fails or ends before is an error."""
    while min(map(len, times)) < count:
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError("a running stream ended before the long prompt was computed; raise RUNNING_TOKENS")
        await asyncio.sleep(WAIT_S)


def _gaps(times: Sequence[list[float]], arrived: float, ended: float) -> dict[str, float]:
    """Gaps before: between tokens that came once all had begun. During: those that overlap the long prompt's time."""
    steady = max(stream[0] for stream in times)
    pairs = [pair for stream in times for pair in itertools.pairwise(stream)]
    before = [after - earlier for earlier, after in pairs if earlier >= steady and after <= arrived]
    during = [after - earlier for earlier, after in pairs if after > arrived and earlier < ended]
    return {
        "median_gap_before_s": _median(before),
        "median_gap_during_s": _median(during),
        "worst_gap_s": round(max(during), 4),
        "long_prompt_s": round(ended - arrived, 3),
    }
