"""`python -m trainer`: the command line. Heavy imports happen inside a command, so that `--help` is instant."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from server.errors import ConfigError
from server.settings import prepare_compute_threads
from server.store.home import Home
from server.store.registry import RegistryError
from trainer.config import default_home, describe_options, load_config

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 the run failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    prepare_compute_threads()
    try:
        home = Home((options.home or default_home()).resolve())
        return int(options.run(options, home))
    except (ConfigError, RegistryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Fine-tune, and publish what was trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", type=Path, help="folder of models, adapters and runs [QLOOP_HOME, .qloop]")

    demo = commands.add_parser("demo", parents=[shared], help="build the demo model and adapter if they are missing")
    demo.add_argument("--force", action="store_true", help="build even if they are up to date")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        parents=[shared],
        help="train a model or an adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="options:\n" + describe_options(),
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="options as .json or .yaml")
    train.add_argument("words", nargs="*", metavar="KEY=VALUE", help="options, on top of the file")
    train.set_defaults(run=_train)

    publish = commands.add_parser("publish", parents=[shared], help="put an adapter into the registry")
    publish.add_argument(
        "folder", type=Path, metavar="RUN_OR_FOLDER", help="a run's id or folder, or an adapter folder"
    )
    publish.add_argument("--name", required=True, help="the adapter's name in the API")
    publish.add_argument("--base", help="base model, if the adapter does not name it")
    publish.set_defaults(run=_publish)
    return parser


def _demo(options: argparse.Namespace, home: Home) -> int:
    from trainer.demo.build import ADAPTER_NAME, MODEL_NAME, build_demo

    built = build_demo(home, force=options.force)
    print(f"{MODEL_NAME} and {ADAPTER_NAME} are {'built' if built else 'up to date'} in {home.path}")
    return 0


def _train(options: argparse.Namespace, home: Home) -> int:
    config = load_config(options.config, options.words)
    from trainer.train import TrainingFailed, train

    try:
        run = train(config, home)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(f"done: {run.path}")
    return 0


def _publish(options: argparse.Namespace, home: Home) -> int:
    from trainer.publish import publish

    folder = options.folder if options.folder.is_dir() else home.runs / options.folder
    entry = publish(folder, options.name, home, base=options.base)
    print(f"published {entry.id} in {entry.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
