"""Fine-tuning speed and memory beside plain transformers and TRL, on short question-answer rows.

    python -m benchmarks.train_speed [--part tiny lora] [--rounds 3] [--tokenizer FOLDER]

tiny: all weights of a two-layer Qwen2 with the full vocabulary of 152k, fp32. lora: LoRA on Qwen2-0.5B's shape, bf16.
Random weights. Each system has a process of its own, one after the other, round after round. Every system learns the
answers only, with the same samples per optimizer step. Exit status 1 when a bar is missed.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, speed_parts
from benchmarks.speed_model import CONFIG, VOCABULARY
from benchmarks.tiny_model import WORDS, write_shape
from benchmarks.train_systems import SYSTEMS
from server.settings import home_path

MIN_SPEED = {"tiny": 2.0, "lora": 1.3}  # times plain Trainer
MAX_MEMORY = 0.3  # of plain Trainer's, above model and optimizer; tiny only
MAX_LOSS_GAP = 0.01
TINY = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
PARTS: dict[str, dict[str, Any]] = {
    "tiny": {"method": "full", "bf16": False, "learning_rate": 1e-3, "num_rows": 256, "epochs": 2, "shape": TINY},
    "lora": {"method": "lora", "bf16": True, "learning_rate": 1e-3, "num_rows": 96, "epochs": 1, "shape": {}},
}
BATCH_SIZE, ACCUMULATION = 16, 2

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    result: Row = {**machine.describe(), "benchmark": "train_speed", "threads": options.threads, "parts": {}}
    names = ("torch", "transformers", "peft", "trl", "accelerate")
    result["versions"] |= machine.package_versions(Path(sys.executable), *names)
    for part in options.part:
        result["parts"][part] = found = measure(part, options)
        print(f"\n{part}\n{table(found)}", flush=True)
    result["passed"] = all(bar["passed"] for found in result["parts"].values() for bar in found["bars"])
    print(f"\nwritten: {machine.save('train_speed', result, options.output)}")
    return 0 if result["passed"] else 1


def measure(part: str, options: argparse.Namespace) -> Row:
    """All systems, round after round; the medians are judged."""
    job = _job(part, options)
    rows = []
    for number in range(1, options.rounds + 1):
        for system in SYSTEMS:
            row = {"system": system, "round": number, **_run(system, job, options)}
            print(f"{_line(row)}  (round {number})", file=sys.stderr, flush=True)
            rows.append(row)
    medians = [_median(system, rows) for system in SYSTEMS]
    return {"job": job["shown"], "medians": medians, "bars": bars(part, medians), "rows": rows}


def bars(part: str, medians: list[Row]) -> list[Row]:
    ours, plain, trl = medians
    ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
    found = [speed_parts.bar(f"{part}: tokens/s, qloop / Trainer", ratio, least=MIN_SPEED[part])]
    if part == "tiny":
        ratio = ours["peak_above_mb"] / plain["peak_above_mb"]
        found.append(speed_parts.bar("tiny: peak memory, qloop / Trainer", ratio, most=MAX_MEMORY))
    for other in (plain, trl):
        gap = abs(ours["final_loss"] / other["final_loss"] - 1)
        found.append(speed_parts.bar(f"{part}: final loss beside {other['system']}", gap, most=MAX_LOSS_GAP))
    return found


def table(found: Row) -> str:
    return "\n".join([found["job"], *map(_line, found["medians"]), *map(speed_parts.bar_line, found["bars"])])


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer is used; default: a small one")
    parser.add_argument("--work", type=Path, help="folder of models, rows and runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work, not a result")
    options = parser.parse_args(argv)
    options.work = (options.work or home_path() / "cache" / "train_speed").resolve()
    if options.quick:
        options.rounds = 1
    return options


def _job(part: str, options: argparse.Namespace) -> Row:
    """Write the part's model and rows; what each process is told."""
    facts = dict(PARTS[part])
    shape = facts.pop("shape")
    if options.quick:
        facts |= {"num_rows": 64, "epochs": 1}
        shape = shape or {"num_hidden_layers": 2}
    folder = options.work / f"{part}{'-quick' if options.quick else ''}"
    model = _write_model(folder / "model", shape, options.tokenizer)
    rows = _write_rows(folder / "rows.jsonl", facts["num_rows"])
    shown = (
        f"{facts['num_rows']} rows x {facts['epochs']} epochs, {BATCH_SIZE} x {ACCUMULATION} samples per step, "
        f"{facts['method']}, {'bf16' if facts['bf16'] else 'fp32'}"
    )
    return facts | {
        "model": str(model),
        "rows": str(rows),
        "home": str(folder / "home"),
        "batch_size": BATCH_SIZE,
        "accumulation": ACCUMULATION,
        "threads": options.threads,
        "scored": 128,
        "seed": 1,
        "shown": shown,
    }


def _run(system: str, job: Row, options: argparse.Namespace) -> Row:
    """One process from its start to its end."""
    shutil.rmtree(job["home"], ignore_errors=True)
    file = Path(job["rows"]).with_name("job.json")
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.train_systems", system, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{system} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _write_model(folder: Path, shape: Row, tokenizer: Path | None) -> Path:
    """Made once per shape: configuration, tokenizer and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "model.safetensors").exists():
        return folder
    write_shape(folder, tokenizer, {**CONFIG, **shape, "vocab_size": VOCABULARY, "torch_dtype": "float32"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def _write_rows(path: Path, count: int) -> Path:
    """Questions of 4 to 24 words, answers of 2 to 20, each made of the question's own words."""
    rng = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question = [rng.choice(WORDS) for _ in range(rng.randint(4, 24))]
            answer = [rng.choice(question) for _ in range(rng.randint(2, 20))]
            messages = [
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _median(system: str, rows: list[Row]) -> Row:
    mine = [row for row in rows if row["system"] == system]
    keys = ("tokens_per_s", "peak_above_mb", "final_loss", "seconds", "steps")
    return {"system": system, **{key: statistics.median(row[key] for row in mine) for key in keys}}


def _line(row: Row) -> str:
    return (
        f"{row['system']:8} {row['tokens_per_s']:8.1f} tokens/s {row['peak_above_mb']:8.1f} MB above model, optimizer; "
        f"final loss {row['final_loss']:.4f} ({row['steps']:g} steps in {row['seconds']:.1f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
