"""What the data commands share: their options, the reading and the writing of rows. Knows no single command."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.output import RowFile
    from trainer.data.rows import LedgerLine, Row
    from trainer.ledger import Ledger

SubParsers = Any  # argparse's own class for it is private
THRESHOLD = 0.8


def add_tool(tools: SubParsers, shared: argparse.ArgumentParser, name: str, text: str, more: str) -> Any:
    """A parser for one command; `more` is what `--help` says below the options."""
    return tools.add_parser(
        name, parents=[shared], help=text, description=text, epilog=more, formatter_class=argparse.RawTextHelpFormatter
    )


def add_files(tool: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    tool.add_argument(
        "files",
        nargs="*" if is_optional else "+",
        metavar="FILE",
        help="files, folders, globs; FILE#1000: its first 1000",
    )
    tool.add_argument(
        "--stage",
        choices=["auto", "pt", "sft", "dpo", "rm", "ppo"],
        default="auto",
        help="what the rows are for [auto: each file by its first rows]",
    )


def add_output(tool: argparse.ArgumentParser, what: str = "JSONL file to write; its ledger lies beside it") -> None:
    tool.add_argument("--output", type=Path, required=True, metavar="PATH", help=what)


def add_near(tool: argparse.ArgumentParser) -> None:
    tool.add_argument(
        "--threshold",
        type=fraction,
        default=THRESHOLD,
        metavar="SHARE",
        help=f"rows are near duplicates from this share of common character n-grams on [{THRESHOLD}]",
    )


def fraction(text: str) -> float:
    """A number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share above 0 and up to 1 is expected, for example 0.8")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is expected")
    return value


def count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is expected")
    return value


@contextmanager
def writing(options: argparse.Namespace) -> "Iterator[tuple[RowFile, Ledger]]":
    """The output and its ledger; when the block ends well they are summed up on stderr, else no output appears."""
    from trainer.data.output import RowFile, check_output, ledger_path
    from trainer.ledger import Ledger

    check_output(options.output, options.files)
    with Ledger(ledger_path(options.output)) as ledger:
        with RowFile(options.output) as file:
            yield file, ledger
            if not file.num_rows:
                ledger.check_ratio(1.0)
        print(ledger.summary(), file=sys.stderr)
    say(f"{file.num_rows} rows in {file.path}, the ledger in {ledger_path(file.path)}")


def say(text: str) -> None:
    print(text, file=sys.stderr)


def read(options: argparse.Namespace, files: Iterable[str] | None = None) -> "Iterator[Row | LedgerLine]":
    """Rows and refusals with a progress bar."""
    from trainer.data.output import progress
    from trainer.data.read import read_rows

    return progress(
        read_rows(options.files if files is None else files, None if options.stage == "auto" else options.stage), "read"
    )
