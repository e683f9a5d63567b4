"""A table of what files hold and what of it can be used. Changes nothing."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.files import names_of, select
from trainer.data.output import check_writable
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Row, Stage
from trainer.errors import DataError
from trainer.ledger import Ledger, place

MANY = 20  # files of one folder that share a line of the table
_HEADER = f"{'rows':>9} {'used':>9} {'repaired':>9} {'dropped':>9}  {'stage':5}  file"


class Part:
    """One line of the table: a file, or a folder of many."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ledger = Ledger()
        self.stages: set[str] = set()

    def record(self, item: Row | LedgerLine, stage: Stage | None) -> None:
        self.ledger.record(item)
        if isinstance(item, Row):
            self.stages.add(stage or _kind(item))

    def lines(self) -> Iterator[str]:
        """The table's line, reasons and the first refused rows below it."""
        counts = (self.ledger.num_rows, self.ledger.num_used, self.ledger.rows["repaired"], self.ledger.rows["dropped"])
        numbers = " ".join(f"{count:>9}" for count in counts)
        yield f"{numbers}  {'+'.join(sorted(self.stages)) or '-':5}  {self.name}"
        yield from (f"{'':41}{line}" for line in self.ledger.reasons())
        yield from (f"{'':43}at {place(line)}" for line in self.ledger.first_dropped)


def check(
    paths: Iterable[str | Path], stage: Stage | None, max_reject_ratio: float, ledger_path: Path | None = None
) -> Iterator[str]:
    """Lines for the screen. Raises DataError at the end if any file has no rows, or too many that cannot be used,
    and ConfigError before anything is written when `ledger_path` is one of the files."""
    paths = list(paths)
    if ledger_path:
        check_writable("--ledger", paths, ledger_path)
    names = _line_names(names_of(select(paths)))
    parts = {name: Part(name) for name in names.values()}
    rows = read_rows(paths, stage)
    with Ledger(ledger_path) as total:
        for item in rows:
            total.record(item)
            parts[names[item.source]].record(item, stage)
    yield _HEADER
    for part in parts.values():
        yield from part.lines()
    if len(parts) > 1:
        yield total.summary()
    _judge(parts.values(), max_reject_ratio)


def _judge(parts: Iterable[Part], max_reject_ratio: float) -> None:
    faults = []
    for part in parts:
        ledger = part.ledger
        if not ledger.num_rows:
            faults.append(f"{part.name}: holds no rows")
        elif ledger.ratio > max_reject_ratio or not ledger.num_used:
            dropped = f"{ledger.rows['dropped']} of {ledger.num_rows} rows ({ledger.ratio:.1%})"
            faults.append(f"{part.name}: {dropped} cannot be used, max_reject_ratio is {max_reject_ratio:.1%}")
    if faults:
        raise DataError("\n".join(faults))


def _line_names(files: list[Path]) -> dict[str, str]:
    """File -> its line's name: the folder's, if it has many files."""
    folders: dict[Path, int] = {}
    for file in files:
        folders[file.parent] = folders.get(file.parent, 0) + 1
    many = {folder: f"{folder}/ ({count} files)" for folder, count in folders.items() if count > MANY}
    return {str(file): many.get(file.parent, str(file)) for file in files}


def _kind(row: Row) -> str:
    return "dpo" if row.chosen else "sft" if row.messages else "pt"
