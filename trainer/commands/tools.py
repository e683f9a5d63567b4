"""Commands around a run: look at its rows, turn its result into something else, try it, see the machine."""

import argparse
from pathlib import Path

from server.store.home import Home
from server.store.model_folder import resolve_model
from trainer.commands.data_options import count
from trainer.commands.train import add_configured, resolve_words

TRUST = "run Python code that lies in the model's folder"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    demo = commands.add_parser("demo", parents=[shared], help="build the demo model and adapter if they are missing")
    demo.add_argument("--force", action="store_true", help="build even if they are up to date")
    demo.set_defaults(run=_demo)

    inspect = add_configured(commands, shared, "inspect", "show the tokens and labels of a run's first rows")
    inspect.add_argument("-n", dest="count", type=count, default=3, metavar="N", help="this many rows [3]")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", parents=[shared], help="add an adapter's weights to its base model")
    merge.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's id or folder, an adapter's folder or name")
    merge.add_argument("output", type=Path, help="the merged model's folder; it must not exist")
    merge.add_argument("--base", help="base model, if the adapter does not name it")
    merge.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    merge.set_defaults(run=_merge)

    quantize = commands.add_parser("quantize", parents=[shared], help="write a model folder in nf4 or int8")
    quantize.add_argument("model", help="a model's folder, its name in the home, or a hub id")
    quantize.add_argument("output", type=Path, help="the quantized model's folder; it must not exist")
    quantize.add_argument("--bits", type=int, choices=(4, 8), default=4, help="4: nf4, 8: int8 [4]")
    quantize.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    quantize.set_defaults(run=_quantize)

    chat = commands.add_parser("chat", parents=[shared], help="talk to a model or to a run's result")
    chat.add_argument("model", metavar="RUN_OR_MODEL", help="a run's id or folder, a model folder, name or hub id")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--max-tokens", type=count, default=512, help="longest answer [512]")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token [0]")
    chat.set_defaults(run=_chat)

    doctor = commands.add_parser("doctor", parents=[shared], help="what this machine has, and what can train on it")
    doctor.set_defaults(run=_doctor)


def _demo(options: argparse.Namespace, home: Home) -> int:
    from trainer.demo.build import ADAPTER_NAME, MODEL_NAME, build_demo

    built = build_demo(home, force=options.force)
    print(f"{MODEL_NAME} and {ADAPTER_NAME} are {'built' if built else 'up to date'} in {home.path}")
    return 0


def _inspect(options: argparse.Namespace, home: Home) -> int:
    resolved = resolve_words(options.words)
    from trainer.examples.inspect_rows import inspect

    for line in inspect(resolved.config, home, options.count):
        print(line)
    return 0


def _merge(options: argparse.Namespace, home: Home) -> int:
    from trainer.results.adapter_folder import named_adapter
    from trainer.results.merge import merge

    folder, base = named_adapter(options.source, home)
    print(merge(folder, options.output, home, base=options.base or base, trust=options.trust_remote_code))
    return 0


def _quantize(options: argparse.Namespace, home: Home) -> int:
    from trainer.results.quantize import quantize

    model = resolve_model(options.model, home)
    print(quantize(model, options.output, options.bits, trust=options.trust_remote_code))
    return 0


def _chat(options: argparse.Namespace, home: Home) -> int:
    from trainer.chat import chat

    return chat(
        options.model,
        home,
        system=options.system,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
    )


def _doctor(options: argparse.Namespace, home: Home) -> int:
    from trainer.doctor import examine

    for line in examine(home):
        print(line)
    return 0
