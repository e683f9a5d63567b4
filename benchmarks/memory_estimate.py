"""Estimated and measured peak memory of fine-tuning on a CPU: Qwen2-0.5B's shape, its vocabulary, random weights.

    python -m benchmarks.memory_estimate [--only 0 4 5] [--tokenizer FOLDER] [--output FILE]

Each combination is a process of its own that trains three steps with the trainer; its peak is the kernel's (VmHWM). The
estimate is made as `train` makes it, from the real rows. Exit status 1 when one is off by more than 15 %.
"""

import argparse
import bisect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine, speed_model
from benchmarks.tiny_model import WORDS, write_shape
from server.settings import home_path

MOST_OFF = 0.15
STEPS = 3
Combination = tuple[str, int, int, dict[str, Any]]
COMBINATIONS: tuple[Combination, ...] = (  # method, length, rows of a forward pass, further options
    ("full", 128, 1, {}),
    ("full", 256, 2, {}),
    ("full", 512, 1, {"gradient_checkpointing": True}),
    ("full", 256, 1, {"bf16": True}),
    ("freeze", 256, 2, {}),
    ("lora", 256, 1, {}),
    ("lora", 512, 2, {}),
    ("lora", 1024, 2, {"gradient_checkpointing": True}),
    ("lora", 256, 2, {"bf16": True}),
    ("lora", 512, 1, {"lora_rank": 64, "lora_dropout": 0.0}),
    ("qlora", 128, 1, {}),
    ("qlora", 512, 1, {}),
    ("qlora", 1024, 1, {"gradient_checkpointing": True}),
    ("qlora", 256, 2, {"bf16": True, "gradient_checkpointing": True}),
    ("prompt", 256, 2, {"pre_seq_len": 32}),
    ("lora", 256, 1, {"stage": "dpo"}),
)
_CHILD = """
import json, re, sys
from pathlib import Path
from server.store.home import Home
from trainer.machine import find_machine
from trainer.options.resolve import resolve
job = json.loads(sys.argv[1])
home = Home(Path(job["home"])).create()
config = resolve(None, job["words"]).config
import trainer.train as t
from trainer.estimate.room import this_machine
from trainer.estimate.rows import read_lengths
from trainer.estimate.reserve import process_bytes
from trainer.estimate.training import Device
from trainer.estimate.verdict import estimate_training
base = Path(config.model_name_or_path)
room = this_machine(find_machine())
found = estimate_training(config, base, room, read_lengths(config, base), Device(process=process_bytes()))
t.train(config, home)
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024
needs = found.needs
print(json.dumps({"estimated": found.bytes, "measured": peak, "step": needs.step, "load": needs.load,
    "tokens": [found.run.rows, found.run.width], "activations": needs.activations, "reserve": needs.reserve}))
"""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    described = machine.describe()  # before the runs, which are a load themselves
    folder = options.work
    model = write_model(folder / "model", options.tokenizer)
    rows = [run(number, model, folder, options.threads) for number in options.only]
    off = [row["off"] for row in rows]
    result = {
        **described,
        "benchmark": "memory_estimate",
        "threads": options.threads,
        "most_off": round(max(map(abs, off)), 3),
        "rows": rows,
        "passed": all(abs(value) <= MOST_OFF for value in off),
    }
    print(table(rows) + f"\n\nresult: {machine.save('memory_estimate', result, options.output)}")
    return 0 if result["passed"] else 1


def run(number: int, model: Path, folder: Path, threads: int) -> Row:
    """One combination in a process of its own."""
    method, length, batch, more = COMBINATIONS[number]
    home = Path(tempfile.mkdtemp(prefix="home-", dir=folder))
    stage = more.get("stage", "sft")
    words = {
        "model_name_or_path": model,
        "train_file": write_rows(folder / f"{stage}-{length}.jsonl", model, length, stage),
        "finetuning_type": method,
        "max_length": length,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
        "memory_check": False,
        **more,
    }
    job = {"home": str(home), "words": [f"{name}={_word(value)}" for name, value in words.items()]}
    command = [sys.executable, "-c", _CHILD, json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(home, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{_title(number)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    row = {"combination": _title(number), **json.loads(done.stdout.splitlines()[-1])}
    row["off"] = round(row["estimated"] / row["measured"] - 1, 4)
    print(_line(row), flush=True)
    return row


def write_model(folder: Path, tokenizer: Path | None, layers: int = speed_model.LAYERS) -> Path:
    """About 1 GB in bf16, as the model is published; made once. Without `tokenizer` it has a small one."""
    if (folder / "model.safetensors").exists():
        return folder
    write_shape(folder, tokenizer, {**speed_model.CONFIG, "num_hidden_layers": layers})
    speed_model.save_tensors(speed_model.model_tensors(layers), folder / "model.safetensors")
    return folder


def write_rows(path: Path, model: Path, length: int, stage: str, count: int = 16) -> Path:
    """Rows of nearly `length` tokens each: a question of 16 words, and an answer that fills what is left."""
    from server.text.render import ChatRenderer

    renderer = ChatRenderer.load(model)
    rng = random.Random(length)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question = " ".join(rng.choice(WORDS) for _ in range(16))
            answer = _answer(renderer, rng, question, length)
            if stage == "dpo":
                other = answer.rsplit(" ", 2)[0]
                row = {"prompt": question, "chosen": answer, "rejected": other}
            else:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = {"messages": messages}
            file.write(json.dumps(row) + "\n")
    return path


def _answer(renderer: Any, rng: random.Random, question: str, length: int) -> str:
    """As many words as leave the row at or below `length` tokens."""
    words = [rng.choice(WORDS) for _ in range(length)]

    def tokens(count: int) -> int:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(words[:count])}]
        return len(renderer.render_training(turns).token_ids)

    count = bisect.bisect_right(range(1, length), length, key=tokens)
    return " ".join(words[:count])


def table(rows: list[Row]) -> str:
    return "\n".join(["", f"{'combination':58} {'estimated':>10} {'measured':>10}  off", *map(_line, rows)])


def _line(row: Row) -> str:
    mark = "" if abs(row["off"]) <= MOST_OFF else "  OVER"
    return (
        f"{row['combination']:58} {row['estimated'] / 2**20:7.0f} MiB {row['measured'] / 2**20:7.0f} MiB "
        f"{row['off']:+6.1%}{mark}"
    )


def _title(number: int) -> str:
    method, length, batch, more = COMBINATIONS[number]
    return f"{number:2} {method} {batch} x {length} " + " ".join(f"{name}={_word(more[name])}" for name in more)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = range(len(COMBINATIONS))
    parser.add_argument("--only", type=int, nargs="+", choices=every, default=list(every), help="numbers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer is used; default: a small one")
    parser.add_argument("--work", type=Path, help="folder of the model, rows and runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    options.work = (options.work or home_path() / "cache" / "memory_estimate").resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
