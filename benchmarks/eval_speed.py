"""Multiple choice per second, in process and through the server's URL, beside lm-evaluation-harness.

    python -m benchmarks.eval_speed --tokenizer FOLDER --lm-eval-python PYTHON [--shots 5 0] [--items 160]

One random Qwen2 in fp32, one set of MMLU-shaped questions, the same prompts to the character. Loading is not counted,
for any system. lm-evaluation-harness runs with each of several batch sizes, and the best one counts. The letters'
log-probabilities are compared, too. Exit status 1 when a bar is missed.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.services import ROOT, qloop
from server.store.home import Home
from trainer.evaluate.eval_folder import read_scores
from trainer.evaluate.items import ChoiceItem
from trainer.evaluate.open_candidate import CandidateOptions, open_candidate
from trainer.evaluate.prompts import Style, by_subject, choice_prompt, continuations, shown
from trainer.evaluate.run import evaluate
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.choice import ChoiceTask

BARS = {5: 2.0, 0: 1.1}  # times lm-evaluation-harness, by shots
URL_BAR = 0.8  # times in process
MAX_GAP = 1e-3  # nats
PORT = 8190
SUBJECTS, EXAMPLES = 4, 5
SENTENCE = "the force of a body is equal to its mass times how fast it moves and which law says that energy never ends"
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 151645,
}

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    result: Row = {**machine.describe(), "benchmark": "eval_speed", "threads": options.threads, "rows": [], "bars": []}
    result["versions"] |= machine.package_versions(Path(sys.executable), "torch", "transformers")
    if options.lm_eval_python:
        result["versions"] |= machine.package_versions(options.lm_eval_python, "lm_eval", "torch", "transformers")
    os.environ |= {"QLOOP_NUM_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory(prefix="qb") as folder:
        model = write_model(Path(folder) / "model", options.tokenizer)
        for shots in options.shots:
            rows, bars = measure(model, shots, options, Path(folder))
            result["rows"] += rows
            result["bars"] += bars
    result["passed"] = all(bar["passed"] for bar in result["bars"])
    for row in result["rows"]:
        print(f"{row['shots']}-shot  {row['system']:<24} {row['items_per_s']:8.2f} items/s")
    for bar in result["bars"]:
        print(f"{'ok    ' if bar['passed'] else 'MISSED'}  {bar['what']}: {bar['value']:.4g} (bar {bar['bar']:g})")
    print(f"\nwritten: {machine.save('eval_speed', result, options.output)}")
    return 0 if result["passed"] else 1


def measure(model: Path, shots: int, options: argparse.Namespace, work: Path) -> tuple[list[Row], list[Row]]:
    """Systems take turns, round after round; the best of each counts, as other work on the machine only slows."""
    items = questions(options.items)
    best: dict[str, float] = {}
    found: dict[str, list[list[float]]] = {}
    home = Home(work / "home").create()
    for turn in range(options.rounds):
        with qloop(model, PORT, workers=1, engine="hf", num_threads=str(options.threads)) as service:
            url = f"http://127.0.0.1:{service.port}/v1#{service.model}"
            _keep(best, found, "qloop, URL", *_ours(url, items, shots, home, work / f"url-{shots}-{turn}"))
        _keep(best, found, "qloop", *_ours(str(model), items, shots, home, work / f"own-{shots}-{turn}"))
        for size in options.batch_sizes if options.lm_eval_python else ():
            name = f"lm_eval, batch {size}"
            _keep(best, found, name, *_theirs(options, model, items, shots, size, work))
    rows = [{"shots": shots, "system": name, "items_per_s": speed} for name, speed in best.items()]
    bars = [_bar(f"{shots}-shot, URL / in process", best["qloop, URL"] / best["qloop"], URL_BAR)]
    peers = {name: speed for name, speed in best.items() if name.startswith("lm_eval")}
    if peers:
        peer = max(peers, key=lambda name: peers[name])
        bars.append(_bar(f"{shots}-shot, qloop / {peer}", best["qloop"] / peers[peer], BARS.get(shots, 1.0)))
        gap = _gap(found["qloop"], found[peer])
        bars.append(
            {"what": f"{shots}-shot, largest gap in nats", "value": gap, "bar": MAX_GAP, "passed": gap <= MAX_GAP}
        )
    return rows, bars


def questions(count: int) -> list[ChoiceItem]:
    """MMLU-shaped: about 60 to 130 tokens each, a few subjects of equal size with five examples each."""
    draw = random.Random(7)

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(SENTENCE.split(), k=draw.randint(low, high))).capitalize()

    def question(subject: int, number: int, is_example: bool) -> ChoiceItem:
        return ChoiceItem(
            item_id=f"{subject}-{number}-{is_example}",
            benchmark="mmlu",
            subject=f"subject {subject}",
            question=sentence(15, 60) + "?",
            options=tuple(sentence(3, 14) for _ in range(4)),
            answers=(draw.randrange(4),),
            is_example=is_example,
        )

    scored = [question(n % SUBJECTS, n, False) for n in range(count)]
    return [*scored, *(question(subject, n, True) for subject in range(SUBJECTS) for n in range(EXAMPLES))]


def write_model(folder: Path, tokenizer: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(SHAPE))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def _ours(name: str, items: list[ChoiceItem], shots: int, home: Home, out: Path) -> tuple[float, list[list[float]]]:
    settings = EvalSettings(shots=shots, style="plain")
    task = ChoiceTask("choice/bench", items, settings)

    async def run() -> float:
        async with open_candidate(name, home, CandidateOptions(engine="hf", dtype="fp32")) as candidate:
            result = await evaluate(candidate, [task], out, settings, shows_progress=False)
            return result.speed["items_per_s"]

    speed = asyncio.run(run())
    scores = read_scores(out)
    return speed, [list(scores[task.name, item.item_id].details["logprobs"].values()) for item in task.items]


def _theirs(
    options: argparse.Namespace, model: Path, items: list[ChoiceItem], shots: int, size: int, work: Path
) -> tuple[float, list[list[float]]]:
    style = Style(shots=shots, is_plain=True)
    task = ChoiceTask("choice/bench", items, EvalSettings(shots=shots))
    asked = [shown(item) for item in task.items]
    prompts = [choice_prompt(each, by_subject(items).get(each.item.subject, ()), style).text for each in asked]
    requests = [[prompt, continuations(each, style)] for prompt, each in zip(prompts, asked, strict=True)]
    job, answer = work / "job.json", work / "answer.json"
    job.write_text(json.dumps({"model": str(model), "batch": size, "threads": options.threads, "requests": requests}))
    script = ROOT / "benchmarks" / "eval_peer.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Not resolve(): the interpreter of a virtual environment is a link.
    command = [str(options.lm_eval_python.absolute()), str(script), str(job), str(answer)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads(answer.read_text())
    return len(requests) / found["seconds"], found["logprobs"]


def _keep(
    best: dict[str, float], found: dict[str, list[list[float]]], name: str, speed: float, values: list[list[float]]
) -> None:
    print(f"{name}: {speed:.2f} items/s", file=sys.stderr, flush=True)
    best[name] = max(speed, best.get(name, 0.0))
    found[name] = values


def _gap(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return max(abs(a - b) for own, other in zip(ours, theirs, strict=True) for a, b in zip(own, other, strict=True))


def _bar(what: str, value: float, bar: float) -> Row:
    return {"what": what, "value": round(value, 3), "bar": bar, "passed": value >= bar}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_speed", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen2's tokenizer")
    parser.add_argument("--lm-eval-python", type=Path, help="interpreter that has lm_eval; without it no peer is run")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 0])
    parser.add_argument("--items", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="does it work, not a result")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if options.quick:
        options.items, options.rounds, options.batch_sizes = 24, 1, [8]
    return options


if __name__ == "__main__":
    sys.exit(main())
