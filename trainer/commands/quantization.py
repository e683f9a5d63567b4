"""`quantization`: what a model would lose and gain in bf16, int8 and nf4."""

import argparse
import sys
from pathlib import Path

from server.store.home import Home
from server.store.model_folder import resolve_model


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "quantization", parents=[shared], help="size, perplexity, agreement and speed in fp32, bf16, int8, nf4"
    )
    parser.add_argument("model", help="a model's folder, its name in the home, or a hub id")
    parser.add_argument("--data", type=Path, metavar="FILE", help="texts or conversations to measure on [some of ours]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write quantization.md and quantization.json there")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    parser.set_defaults(run=_quantization)


def _quantization(options: argparse.Namespace, home: Home) -> int:
    from dataclasses import asdict

    from server.store.hashes import write_json, write_text
    from trainer.quantization.report import measure
    from trainer.quantization.tables import markdown, text

    model = resolve_model(options.model, home)
    report = measure(
        model, options.data, trust=options.trust_remote_code, say=lambda line: print(line, file=sys.stderr)
    )
    print(text(report))
    if options.output:
        write_text(options.output / "quantization.md", markdown(report))
        write_json(options.output / "quantization.json", asdict(report))
        print(f"written to {options.output}")
    return 0
