"""`python -m trainer data` check, convert: what files hold, and their rows in other forms."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from server.store.home import Home
from trainer.commands.data_options import SubParsers, add_files, add_tool, say

if TYPE_CHECKING:
    from trainer.data.rows import Stage

MAX_REJECT_RATIO = 0.05
FORMS = ("messages", "alpaca", "sharegpt", "text")
_KNOWN = """\
read without being told what they are, also under each other's file endings:
  JSON arrays, JSON lines, CSV and TSV with a header, text files; UTF-8, UTF-16 with its mark, GB18030
  conversations: messages, alpaca (history, system), sharegpt, prompt/response, query/response, content/summary,
    question/answer, ask/answer, instruct/output, firefly, input/output turns, client/counselor turns,
    text with speakers (来访者：…), tool calls
  pairs: chosen/rejected, ranked lists of outputs        text: text, content, plain text files
"""


def add(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    """Put the commands below `data`."""
    _add_check(tools, shared)
    _add_convert(tools, shared)


def _add_check(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = f"""{_KNOWN}
exit code 3 when more than --max-reject-ratio of a file's rows cannot be used

examples:
  python -m trainer data check dialogues/ medical.csv
  python -m trainer data check 'raw/*.json' --ledger rejects.jsonl"""
    tool = add_tool(tools, shared, "check", "rows in, used, repaired and dropped, by reason", more)
    add_files(tool)
    tool.add_argument("--ledger", type=Path, metavar="PATH", help="JSONL file for every row that has a remark")
    tool.add_argument(
        "--max-reject-ratio",
        type=float,
        default=MAX_REJECT_RATIO,
        metavar="SHARE",
        help=f"share of a file's rows that may be dropped [{MAX_REJECT_RATIO}]",
    )
    tool.set_defaults(run=_check)


def _check(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.check import check

    for line in check(options.files, _stage(options), options.max_reject_ratio, options.ledger):
        print(line)
    return 0


def _add_convert(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = f"""{_KNOWN}
examples:
  python -m trainer data convert medical.csv --to messages --output medical.jsonl
  python -m trainer data convert dialogues/ --to sharegpt --output dialogues.jsonl"""
    tool = add_tool(tools, shared, "convert", "all usable rows as JSONL in one form", more)
    add_files(tool)
    tool.add_argument("--to", choices=FORMS, required=True, help="the form of the rows")
    tool.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    tool.set_defaults(run=_convert)


def _convert(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.convert import convert

    ledger = convert(options.files, options.to, options.output, _stage(options))
    say(ledger.summary())
    say(f"{ledger.num_used} rows in {options.output}")
    return 0


def _stage(options: argparse.Namespace) -> "Stage | None":
    """None: each file's own."""
    return None if options.stage == "auto" else options.stage
