"""`python -m trainer data` clean, dedup, leak, stats: options in, files and a summary out."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from server.store.home import Home
from trainer.commands.data_options import (
    SubParsers,
    add_files,
    add_near,
    add_output,
    add_tool,
    positive,
    read,
    say,
    writing,
)
from trainer.data.repairs import REPAIRS
from trainer.data.rules import RULES

if TYPE_CHECKING:
    from trainer.data.rows import LedgerLine, Row
    from trainer.data.stats import Statistics

EXIT_LEAK = 3
PLOTS = ("lengths.png", "lengths.csv", "labels.png", "labels.csv")


def add(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    """Put the commands below `data`."""
    for add_one in (_add_clean, _add_dedup, _add_leak, _add_stats):
        add_one(tools, shared)


def _add_clean(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    rules = [
        f"  {rule.name:<16}{'on ' if rule.is_on else 'off'} {f'{rule.limit:g}' if rule.limit else '-':>6}  {rule.text}"
        for rule in RULES
    ]
    repairs = [f"  {repair.name:<20} {repair.text}" for repair in REPAIRS]
    more = ["rules, default limits:", *rules, "repairs (all on):", *repairs, "", "examples:"]
    more += [
        "  python -m trainer data clean raw.csv --output clean.jsonl",
        "  python -m trainer data clean raw/ --off url,html --on refusal --limit too-long=8000 --output clean.jsonl",
    ]
    tool = add_tool(tools, shared, "clean", "repair rows, and drop those that rules refuse", "\n".join(more))
    add_files(tool)
    add_output(tool)
    tool.add_argument("--on", type=_names, default=[], metavar="RULE,...", help="rules to use that are off")
    tool.add_argument("--off", type=_names, default=[], metavar="RULE,...", help="rules and repairs not to use")
    tool.add_argument(
        "--limit",
        action="append",
        type=_limit,
        default=[],
        metavar="RULE=NUMBER",
        help="another limit; turns the rule on",
    )
    tool.set_defaults(run=_clean)


def _clean(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.clean import Cleaner, clean_rows

    cleaner = Cleaner.chosen(options.on, options.off, dict(options.limit))
    with writing(options) as (file, ledger):
        for row in ledger.take(clean_rows(read(options), cleaner)):
            file.write(row)
    return 0


def _add_dedup(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = """examples:
  python -m trainer data dedup clean.jsonl --output unique.jsonl
  python -m trainer data dedup clean.jsonl --by question --threshold 0.9 --output unique.jsonl
  python -m trainer data dedup clean.jsonl --exact --output unique.jsonl"""
    text = "keep the first of equal and of nearly equal rows"
    tool = add_tool(tools, shared, "dedup", text, more)
    add_files(tool)
    add_output(tool)
    add_near(tool)
    tool.add_argument("--exact", action="store_true", help="equal rows only (but for case, width and white space)")
    tool.add_argument(
        "--by",
        choices=["row", "question", "answer"],
        default="row",
        help="what is compared, system prompts aside [row]",
    )
    tool.set_defaults(run=_dedup)


def _dedup(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.dedup import without_duplicates
    from trainer.data.read import REPEATED
    from trainer.data.rows import Row

    def untold() -> "Iterator[Row | LedgerLine]":
        """The reader's remark on repeated rows is left out: here such a row gets a line that says what it repeats."""
        for item in read(options):
            if isinstance(item, Row) and REPEATED in item.notes:
                item = replace(item, notes=tuple(note for note in item.notes if note != REPEATED))
            yield item

    with writing(options) as (file, ledger):
        threshold = None if options.exact else options.threshold
        for item in without_duplicates(ledger.take(untold()), threshold, options.by):
            file.write(item) if isinstance(item, Row) else ledger.add(item)
    return 0


def _add_leak(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = f"""Exit code {EXIT_LEAK} when valid rows were found and no --output takes the others.

examples:
  python -m trainer data leak train.jsonl --valid valid.jsonl
  python -m trainer data leak train.jsonl --valid valid.jsonl --output valid-clean.jsonl"""
    tool = add_tool(tools, shared, "leak", "find valid rows that are in train, exactly or nearly", more)
    add_files(tool)
    add_near(tool)
    tool.add_argument("--valid", nargs="+", required=True, metavar="FILE", help="rows that training must not have seen")
    tool.add_argument("--by", choices=["row", "question"], default="question", help="what is compared [question]")
    tool.add_argument("--output", type=Path, metavar="PATH", help="JSONL file for the valid rows that are not in train")
    tool.set_defaults(run=_leak)


def _leak(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.dedup import without_duplicates
    from trainer.data.rows import LedgerLine, Row
    from trainer.ledger import Ledger

    seen = Ledger()
    train = seen.take(read(options))

    def found(ledger: Ledger) -> "Iterator[Row | LedgerLine]":
        valid = ledger.take(read(options, options.valid))
        return without_duplicates(train, options.threshold, options.by, valid=valid)

    if options.output:
        from trainer.data.output import check_output

        check_output(options.output, options.valid)
        with writing(options) as (file, ledger):
            for item in found(ledger):
                file.write(item) if isinstance(item, Row) else ledger.add(item)
        return 0
    with Ledger() as ledger:
        lines = [item for item in found(ledger) if isinstance(item, LedgerLine)]
    for line in lines:
        print(f"{line.source}:{line.line} {line.code}: {line.detail}")
    say(f"{len(lines)} of {ledger.num_used} valid rows are among {seen.num_used} train rows")
    if seen.rows["dropped"]:
        say(f"{seen.rows['dropped']} train rows cannot be used and were not compared")
    return EXIT_LEAK if lines else 0


def _add_stats(tools: SubParsers, shared: argparse.ArgumentParser) -> None:
    more = """examples:
  python -m trainer data stats clean.jsonl
  python -m trainer data stats clean.jsonl --label-field department --plot plots/ --output stats.json
  python -m trainer data stats clean.jsonl --model Qwen/Qwen2-7B-Instruct"""
    tool = add_tool(tools, shared, "stats", "count rows, turns, lengths and labels", more)
    add_files(tool)
    tool.add_argument("--label-field", metavar="NAME", help="count the values of this field of the rows")
    tool.add_argument("--model", metavar="MODEL", help="count tokens as this model's tokenizer and template make them")
    tool.add_argument("--plot", type=Path, metavar="FOLDER", help="lengths.png and labels.png, each with its CSV")
    tool.add_argument("--output", type=Path, metavar="FILE", help="everything as JSON")
    tool.set_defaults(run=_stats)


def _stats(options: argparse.Namespace, home: Home) -> int:
    from trainer.data.output import check_writable
    from trainer.data.stats import Statistics, check_labels, table
    from trainer.data.token_count import token_counter
    from trainer.ledger import Ledger

    if options.output:
        check_writable("--output", options.files, options.output)
    if options.plot:
        check_writable("--plot", options.files, *(options.plot / name for name in PLOTS))
    statistics = Statistics(options.label_field, token_counter(options.model, home) if options.model else None)
    with Ledger() as ledger:
        for row in ledger.take(read(options)):
            statistics.add(row)
        ledger.check_ratio(1.0)
    if options.label_field:
        check_labels(statistics.labels, options.label_field)
    print(table(statistics))
    say(ledger.summary())
    if options.output:
        from server.store.hashes import write_json

        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, statistics.as_json())
    if options.plot:
        _plot(options.plot, statistics)
    return 0


def _plot(folder: Path, statistics: "Statistics") -> None:
    from trainer.data.charts import draw_labels, draw_lengths

    folder.mkdir(parents=True, exist_ok=True)
    draw_lengths({"turns": statistics.turns, **statistics.lengths}, folder)
    if statistics.label_field:
        for warning in draw_labels(statistics.label_shares(), statistics.label_field, folder):
            say(f"warning: {warning}")
    say(f"plots in {folder}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), positive(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: RULE=NUMBER is expected, for example too-long=8000") from None
