"""Memory of one HTTP worker, after its start and after 1,000 requests.

    python -m benchmarks.worker_memory [--tokenizer FOLDER] [--requests 1000] [--output FILE]

With a small model folder of its own and, with --tokenizer, with that folder's vocabulary (Qwen2's has 151,643 entries).
RSS counts pages that workers share once for each; PSS divides them, USS leaves them out. Exit status 1 over the bar.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, services, tiny_model
from benchmarks.load import run_load, run_short
from benchmarks.services import Service

MAX_RSS_MIB = {"small": 90.0, "tokenizer": 190.0}
NUM_CLIENTS = 10
NUM_STREAMS = 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tokenizer", type=Path, help="model folder whose vocabulary is measured too")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=8130)
    parser.add_argument("--quick", action="store_true", help="100 requests")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.quick:
        options.requests = 100
    result = {
        **machine.describe(),
        "benchmark": "worker_memory",
        "requests": options.requests,
        "rows": _measure(options),
    }
    result["passed"] = all(row["rss_mib"] <= row["bar_mib"] for row in result["rows"])
    print(table(result["rows"]) + f"\n\nresult: {machine.save('worker_memory', result, options.output)}")
    return 0 if result["passed"] else 1


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        models = {"small": tiny_model.write_tiny_model(Path(folder) / "small")}
        if options.tokenizer:
            models["tokenizer"] = _without_weights(options.tokenizer, Path(folder) / "tokenizer")
        rows = []
        for kind, model in models.items():
            with services.qloop(model, options.port, workers=options.workers) as service:
                rows += _memory(service, kind, "after start")
                _work(service, options.requests)
                rows += _memory(service, kind, f"after {options.requests} requests")
        return rows


def _without_weights(folder: Path, target: Path) -> Path:
    """The fake backend reads configuration and tokenizer only, and large weights would be hashed for nothing."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            shutil.copy(path, target)
    return target


def _work(service: Service, num_requests: int) -> None:
    """Three quarters short whole answers, the rest streams of 50 tokens, with prompts that differ."""
    num_streams = num_requests // 4
    message = {"role": "user", "content": tiny_model.prompt(3)}
    body = {"model": service.model, "messages": [message], "max_tokens": 20, "ignore_eos": True}
    run_short(service.port, body, num_requests - num_streams, NUM_CLIENTS)
    for start in range(0, num_streams, NUM_STREAMS):
        numbers = range(start, min(start + NUM_STREAMS, num_streams))
        bodies = [
            {**body, "max_tokens": 50, "stream": True, "messages": [{**message, "content": tiny_model.prompt(number)}]}
            for number in numbers
        ]
        _, reads = run_load(service.port, bodies, lambda: None)
        assert all(read.is_done for read in reads), "a stream was cut"


def _memory(service: Service, kind: str, when: str) -> list[dict[str, Any]]:
    rows = []
    for number, process in enumerate(service.api):
        info = process.memory_full_info()
        sizes = {f"{name}_mib": round(getattr(info, name) / 2**20, 1) for name in ("rss", "pss", "uss")}
        rows.append({"model": kind, "when": when, "worker": number, **sizes, "bar_mib": MAX_RSS_MIB[kind]})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'model':10} {'when':22} {'worker':>6} {'RSS':>8} {'PSS':>8} {'USS':>8}  MiB (bar: RSS)"]
    for row in rows:
        verdict = "" if row["rss_mib"] <= row["bar_mib"] else "  OVER"
        lines.append(
            f"{row['model']:10} {row['when']:22} {row['worker']:6} {row['rss_mib']:8.1f} {row['pss_mib']:8.1f} "
            f"{row['uss_mib']:8.1f}  {row['bar_mib']:.0f}{verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
