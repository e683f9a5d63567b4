"""`python -m trainer`: the command line. Heavy imports happen inside a command, so that `--help` is instant."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from server.errors import ConfigError
from server.settings import prepare_compute_threads
from server.store.home import Home
from server.store.registry import RegistryError
from trainer.commands import (
    benchmarks,
    compare,
    data,
    estimate,
    evaluate,
    publish,
    quantization,
    runs,
    tools,
    train,
    verify,
)
from trainer.config import default_home
from trainer.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, TrainerError
from trainer.launch import end

GROUPS = (train, data, tools, runs, benchmarks, evaluate, compare, verify, publish, quantization, estimate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `trainer.errors` has the list."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(train.arrange(words))
    options.arguments = words
    prepare_compute_threads()
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        home = Home((options.home or default_home()).resolve())
        code = int(options.run(options, home))
        sys.stdout.flush()  # here, where a closed pipe is heard
        return code
    except (ConfigError, RegistryError) as error:
        return end(EXIT_CONFIG, str(error))
    except TrainerError as error:
        return end(error.exit_code, str(error))
    except BrokenPipeError:
        # Whoever read the output, `head` perhaps, has enough; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            raise
        return end(EXIT_FAILED, f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return end(EXIT_INTERRUPTED, "stopped")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Fine-tune, and publish what was trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", type=Path, help="folder of models, adapters and runs [QLOOP_HOME, .qloop]")
    for group in GROUPS:
        group.add(commands, shared)
    return parser


if __name__ == "__main__":
    sys.exit(main())
