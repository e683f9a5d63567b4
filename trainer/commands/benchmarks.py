"""`python -m trainer benchmarks`: what the files of a benchmark hold, before a model is asked."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from server.store.home import Home
from trainer.commands.data_options import count

if TYPE_CHECKING:
    from trainer.evaluate.items import ItemSet

EXAMPLES = """examples:
  python -m trainer benchmarks ceval/ mmcu/test
  python -m trainer benchmarks exam.xlsx --kind choice --show 3
  python -m trainer benchmarks spider/dev.json --files"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    text = "read benchmark files: questions in, scored, refused and why"
    tool = commands.add_parser(
        "benchmarks", parents=[shared], help=text, description=text, epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    tool.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders of benchmarks")
    tool.add_argument(
        "--kind",
        choices=["choice", "text", "sql", "bbh"],
        help="read every file as this kind [each file by its first records]",
    )
    tool.add_argument("--files", action="store_true", help="a line per file")
    tool.add_argument(
        "--show", type=count, default=0, metavar="N", help="show the first N items and refusals of each benchmark"
    )
    tool.set_defaults(run=_run)


def _run(options: argparse.Namespace, home: Home) -> int:
    from trainer.errors import DataError
    from trainer.evaluate.item_table import shown, table
    from trainer.evaluate.read_items import read_items

    sets: list[ItemSet] = []
    for path in options.paths:
        sets += read_items(path, options.kind)
    print(table(sets, by_file=options.files))
    for item_set in sets if options.show else ():
        print("\n".join(("", *shown(item_set, options.show))))
    if not any(item_set.items for item_set in sets):
        more = "" if options.show else ", and --show 5 shows where"
        raise DataError(
            f"no item can be scored; the reasons stand above{more} (docs/benchmarks.md: what is understood)"
        )
    return 0
