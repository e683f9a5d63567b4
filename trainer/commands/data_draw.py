"""`python -m trainer data` split, sample, identity: options in, files and a summary out."""

import argparse
from typing import Any

from server.errors import ConfigError
from server.store.home import Home
from trainer.commands.data_options import (
    SubParsers,
    add_files,
    add_near,
    add_output,
    add_tool,
    count,
    positive,
    read,
    say,
    writing,
)


def add(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    """Put the commands below `data`."""
    for add_one in (_add_split, _add_sample, _add_identity):
        add_one(tools, shared)


def _add_split(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = """Writes PATH/train.jsonl and PATH/valid.jsonl.
Rows with the same question, and near duplicates, stay on one side.

examples:
  python -m trainer data split clean.jsonl --size 0.05 --output data/
  python -m trainer data split clean.jsonl --size 500 --label-field department --seed 7 --output data/"""
    tool = add_tool(tools, shared, "split", "divide rows into train and valid", more)
    add_files(tool)
    add_output(tool, "folder for train.jsonl and valid.jsonl")
    add_near(tool)
    tool.add_argument("--size", type=positive, required=True, help="valid rows: a share below 1, or a number of rows")
    tool.add_argument("--label-field", metavar="NAME", help="each value of this field has its share on both sides")
    tool.add_argument("--seed", type=int, default=42, help="the same seed divides the same rows alike [42]")
    tool.set_defaults(run=_split)


def _split(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.output import RowFile, check_writable, ledger_path, progress
    from trainer.data.split import split
    from trainer.data.spool import Spool
    from trainer.ledger import Ledger

    train_path, valid_path = options.output / "train.jsonl", options.output / "valid.jsonl"
    rejects_path = ledger_path(options.output / "split.jsonl")
    check_writable("--output", options.files, train_path, valid_path, rejects_path)
    with Spool() as spool, Ledger(rejects_path) as ledger:
        drawn = split(
            ledger.take(read(options)),
            spool,
            options.size,
            label_field=options.label_field,
            threshold=options.threshold,
            seed=options.seed,
        )
        with RowFile(train_path) as train, RowFile(valid_path) as valid:
            for number, row in enumerate(progress(spool, "write", len(spool))):
                (valid if number in drawn.valid else train).write(row)
    say(ledger.summary())
    if options.label_field:
        print(f"{'train':>9} {'valid':>9}  {options.label_field}")
        for label, num_train, num_valid in drawn.labels:
            print(f"{num_train:>9} {num_valid:>9}  {label}")
    say(f"{drawn.num_groups} groups, the largest of {drawn.largest_group} rows")
    say(f"{train.num_rows} rows in {train_path}, {valid.num_rows} rows in {valid_path}")
    return 0


def _add_sample(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = """examples:
  python -m trainer data sample clean.jsonl -n 1000 --output small.jsonl
  python -m trainer data sample clean.jsonl -n 20000 --balance department --temperature 3 --output balanced.jsonl"""
    tool = add_tool(tools, shared, "sample", "take some rows; with --balance, hear the long tail", more)
    add_files(tool)
    add_output(tool)
    tool.add_argument("-n", "--num-rows", type=count, required=True, help="how many rows to write")
    tool.add_argument("--balance", metavar="FIELD", help="rows per value of this field ~ count ** (1 / temperature)")
    tool.add_argument("--temperature", type=positive, default=3.0, help="1 keeps the shares, 100 makes them equal [3]")
    tool.add_argument("--max-repeat", type=count, default=5, help="how often one row may be taken with --balance [5]")
    tool.add_argument("--seed", type=int, default=42, help="the same seed takes the same rows [42]")
    tool.set_defaults(run=_sample)


def _sample(options: argparse.Namespace, home: Home) -> int:
    from collections import Counter

    from trainer.data.sample import sample_balanced, sample_rows
    from trainer.data.spool import Spool
    from trainer.data.stats import check_labels, label_of

    labels = []
    with writing(options) as (file, ledger), Spool() as spool:
        for row in ledger.take(read(options)):
            spool.add(row)
            labels.append(label_of(row, options.balance) if options.balance else "")
        if options.balance:
            check_labels(labels, options.balance)
            taken = sample_balanced(labels, options.num_rows, options.temperature, options.max_repeat, options.seed)
        else:
            taken = sample_rows(len(spool), options.num_rows, options.seed)
        for number in sorted(taken):
            row = spool[number]
            for _ in range(taken[number]):
                file.write(row)
    if options.balance:
        before, after = Counter(labels), Counter(labels[number] for number in taken.elements())
        print(f"{'before':>9} {'after':>9}  {options.balance}")
        for label, times in before.most_common():
            print(f"{times:>9} {after[label]:>9}  {label}")
    return 0


def _add_identity(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = """Without FILE, rows are made from our own questions and answers.
With FILE, {{name}} and {{author}} are filled in there.

examples:
  python -m trainer data identity --name 小智 --author 某某公司 --output identity.jsonl
  python -m trainer data identity --name Ada --author "Example Inc" --language en --held-out 20 --output identity.jsonl
  python -m trainer data identity self_cognition.json --name 小智 --author 某某公司 --output identity.jsonl"""
    tool = add_tool(tools, shared, "identity", "make rows that teach a model its name and its author", more)
    add_files(tool, is_optional=True)
    add_output(tool)
    tool.add_argument("--name", required=True, help="what the model calls itself")
    tool.add_argument("--author", required=True, help="who made it")
    tool.add_argument("--language", choices=["zh", "en", "both"], default="both", help="of our own questions [both]")
    tool.add_argument(
        "--held-out", type=int, default=0, metavar="N", help="N questions go to OUTPUT.held-out.jsonl [0]"
    )
    tool.add_argument("--seed", type=int, default=42, help="the same seed makes the same rows [42]")
    tool.set_defaults(run=_identity)


def _identity(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.identity import filled, hold_out, identity_rows
    from trainer.data.output import RowFile, check_writable
    from trainer.data.rows import Row

    if not (options.name.strip() and options.author.strip()):
        raise ConfigError("--name and --author: an empty one would teach nothing")
    held_path = options.output.with_name(f"{options.output.stem}.held-out.jsonl")
    check_writable("--held-out", options.files, held_path)
    with writing(options) as (file, ledger):
        if options.files:
            made: Any = (
                filled(item, options.name, options.author) if isinstance(item, Row) else item for item in read(options)
            )
        else:
            made = identity_rows(options.name, options.author, options.language, options.seed)
        rows, held = hold_out(ledger.take(made), options.held_out)
        for row in rows:
            file.write(row)
    if held:
        with RowFile(held_path) as aside:
            for row in held:
                aside.write(row)
        say(f"{aside.num_rows} rows in {aside.path}: ask them after training")
    return 0
