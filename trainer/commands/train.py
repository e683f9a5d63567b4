"""`train`, and its stages as commands of their own: `python -m trainer dpo run.yaml lora_rank=8`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from server.store.home import Home
from trainer.launch import is_first_rank, launch
from trainer.machine import Machine, find_machine
from trainer.options.describe import describe, describe_options
from trainer.options.resolve import Resolved, resolve
from trainer.options.sources import join_flags
from trainer.options.translate import HINTS, LISTS, SWITCHES

STAGES: tuple[str, ...] = get_args(HINTS["stage"])
# Commands that take a configuration, with the options that are theirs and not the configuration's: name -> has a value.
CONTROLS = {
    **{name: {"--home": True, "--print-config": False, "-h": False, "--help": False} for name in ("train", *STAGES)},
    "inspect": {"--home": True, "-n": True, "-h": False, "--help": False},
    "verify": {
        **dict.fromkeys(("--home", "--engine", "--server", "--max-rank", "--base"), True),
        **dict.fromkeys(("--prompts", "--tokens", "--output"), True),
        **dict.fromkeys(("--trust-remote-code", "-h", "--help"), False),
    },
    "estimate": {
        **dict.fromkeys(("--home", "--gpus", "--probe", "--context", "--concurrency"), True),
        **dict.fromkeys(("--dtype", "--kv-dtype", "--adapters"), True),
        **dict.fromkeys(("--serve", "--json", "--no-data", "-h", "--help"), False),
    },
}
EPILOG = """\
CFG is a .json or .yaml file of options, or a shell script (.sh) that starts another tool's training: it is read, not
run. Options on the command line win. Names of transformers, LLaMA-Factory, DeepSpeed-Chat, Firefly and ms-swift are
understood; whatever is changed is printed. Unknown options and pairs that cannot be stop the run before it starts.

options:
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    add_configured(commands, shared, "train", "train a model or an adapter").set_defaults(run=_train, stage=None)
    for stage in STAGES:
        add_configured(commands, shared, stage, f"train with stage={stage}").set_defaults(run=_train, stage=stage)


def add_configured(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    shared: argparse.ArgumentParser,
    name: str,
    text: str,
) -> argparse.ArgumentParser:
    """A command that takes `CFG key=value ...`."""
    parser = commands.add_parser(
        name,
        parents=[shared],
        help=text,
        usage=f"python -m trainer {name} [CFG] [key=value ...] [--key value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG + describe_options(),
    )
    if "--print-config" in CONTROLS[name]:
        parser.add_argument("--print-config", action="store_true", help="show every value with its source, then end")
    parser.add_argument("words", nargs="*", metavar="CFG key=value", help="a file, then options on top of it")
    return parser


def arrange(arguments: Sequence[str]) -> list[str]:
    """Put a configured command's own options first and all else behind `--`, where argparse leaves it alone."""
    controls = CONTROLS.get(arguments[0]) if arguments else None
    if controls is None:
        return list(arguments)
    own: list[str] = []
    rest: list[str] = []
    position = 1
    while position < len(arguments):
        argument = arguments[position]
        has_value = controls.get(argument.partition("=")[0])
        count = 2 if has_value and "=" not in argument else 1
        (rest if has_value is None else own).extend(arguments[position : position + count])
        position += count
    return [arguments[0], *own, "--", *rest]


def resolve_words(words: Sequence[str], stage: str | None = None, machine: Machine | None = None) -> Resolved:
    """The configuration of a command's words: the first that is no `key=value` is the file."""
    joined = join_flags(words, SWITCHES, LISTS)
    files = [word for word in joined if not re.match(r"[A-Za-z_][\w-]*=", word)]
    if files:
        joined.remove(files[0])
    return resolve(Path(files[0]) if files else None, joined, stage=stage, machine=machine)


def _train(options: argparse.Namespace, home: Home) -> int:
    resolved = resolve_words(options.words, options.stage)
    if options.print_config:
        print(describe(resolved))
        return 0
    code = launch(resolved.config, find_machine(), options.arguments)
    if code is not None:
        return code
    if is_first_rank():
        for note in resolved.notes:
            print(note, file=sys.stderr)
    from trainer.train import train

    run = train(resolved.config, home)
    if is_first_rank():
        print(f"done: {run.path}")
    return 0
