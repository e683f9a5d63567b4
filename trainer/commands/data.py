"""`data`: look at training data, mend it, divide it. Each action is imported when it runs."""

import argparse

from trainer.commands import data_ask, data_draw, data_formats, data_tools


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="check, convert, clean, and divide training data")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    for group in (data_formats, data_tools, data_draw, data_ask):
        group.add(actions, shared)
