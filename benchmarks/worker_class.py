"""Gunicorn's own `asgi` worker class beside uvicorn's, for our app and the same load, in turns.

    python -m benchmarks.worker_class [--rounds 3] [--quick] [--output FILE]

CPU of the workers per 1,000 tokens at 128 streams, time to first byte, short whole answers per second, and memory.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, services, tiny_model
from benchmarks.load import run_load, run_short
from benchmarks.services import Service

CLASSES = ("uvicorn_worker.UvicornWorker", "asgi")
NUM_CLIENTS = 16
MEASURES = {
    "cpu_s_per_1000_streaming": "CPU s / 1,000 tokens, streaming",
    "cpu_s_per_1000_whole": "CPU s / 1,000 tokens, whole",
    "first_byte_ms": "time to first byte, ms (median of 128 at once)",
    "short_per_s": "short answers / s",
    "short_cpu_ms": "CPU ms / short answer",
    "short_p99_ms": "short answer, ms (p99)",
    "rss_mib": "RSS of a worker, MiB",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker_class", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--tokens-per-s", type=float, default=20.0)
    parser.add_argument("--short", type=int, default=2000, help="number of short requests in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8130, help="first of two free ports")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.tokens, options.short = 1, 60, 320
    result = {**machine.describe(), "benchmark": "worker_class", "rounds": _measure(options)}
    result["summary"] = {
        name: {
            key: round(statistics.median(row[key] for row in result["rounds"] if row["class"] == name), 4)
            for key in MEASURES
        }
        for name in CLASSES
    }
    print(table(result["summary"]))
    print(f"\nresult: {machine.save('worker_class', result, options.output)}")
    return 0


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A pair of fresh services in each round: one with the paced engine for streams, one unpaced for short answers."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model.write_tiny_model(Path(folder) / "tiny")
        for number in range(options.rounds):
            for name in CLASSES:
                gunicorn_args = f"--worker-class {name}"
                pace = str(options.tokens_per_s)
                with services.qloop(
                    model, options.port, gunicorn_args=gunicorn_args, fake_tokens_per_s=pace
                ) as service:
                    row = {"class": name, "round": number + 1, **_streams(service, options)}
                with services.qloop(model, options.port + 1, gunicorn_args=gunicorn_args) as service:
                    row |= _short(service, options)
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def _streams(service: Service, options: argparse.Namespace) -> dict[str, float]:
    def load(num_tokens: int) -> dict[str, float]:
        bodies = [{**_body(service, index, num_tokens), "stream": True} for index in range(options.streams)]
        window, reads = run_load(service.port, bodies, service.cpu_s)
        assert all(read.num_content == num_tokens and read.is_done for read in reads), "a stream was cut or merged"
        streaming = sum(read.num_content - read.num_content_before_mark for read in reads)
        return {
            "cpu_s_per_1000_streaming": (window.ended["api"] - window.begun["api"]) * 1000 / streaming,
            "cpu_s_per_1000_whole": (window.ended["api"] - window.offered["api"]) * 1000 / num_tokens / len(reads),
            "first_byte_ms": statistics.median(window.first_byte_s) * 1000,
        }

    load(10)
    return load(options.tokens)


def _short(service: Service, options: argparse.Namespace) -> dict[str, float]:
    body = _body(service, 0, 1)
    run_short(service.port, body, 10 * NUM_CLIENTS, NUM_CLIENTS)
    before = service.cpu_s()["api"]
    per_s, times = run_short(service.port, body, options.short, NUM_CLIENTS)
    return {
        "short_per_s": per_s,
        "short_cpu_ms": (service.cpu_s()["api"] - before) * 1000 / len(times),
        "short_p99_ms": statistics.quantiles(times, n=100)[98] * 1000,
        "rss_mib": max(process.memory_info().rss for process in service.api) / 2**20,
    }


def _body(service: Service, index: int, num_tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": tiny_model.prompt(index)}
    return {"model": service.model, "messages": [message], "max_tokens": num_tokens, "ignore_eos": True}


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':50}" + "".join(f"{name.rpartition('.')[2]:>16}" for name in found)]
    lines += [f"{text:50}" + "".join(f"{row[key]:16.4g}" for row in found.values()) for key, text in MEASURES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
