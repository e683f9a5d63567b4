"""Rows without those that repeat an earlier one, and valid rows that train rows give away. Knows no command line."""

from collections.abc import Iterable, Iterator

from trainer.data.duplicates import Duplicate, Fingerprints, find_duplicates
from trainer.data.rows import LedgerLine, Row
from trainer.data.spool import Spool
from trainer.data.texts import By, normalised, text_of


def spooled(rows: Iterable[Row], spool: Spool, threshold: float | None, by: By) -> Fingerprints:
    """Keep all rows on disk and what tells them apart in memory."""
    fingerprints = Fingerprints(threshold)
    for row in rows:
        spool.add(row)
        fingerprints.add(normalised(text_of(row, by)))
    return fingerprints


def duplicates(
    spool: Spool,
    fingerprints: Fingerprints,
    by: By,
    *,
    references: int | None = None,
    against_all: bool = False,
) -> Iterator[Duplicate]:
    """`find_duplicates` over spooled rows."""

    def read_text(number: int) -> str:
        return normalised(text_of(spool[number], by))

    return find_duplicates(fingerprints, read_text, references=references, against_all=against_all)


def without_duplicates(
    rows: Iterable[Row], threshold: float | None, by: By = "row", *, valid: Iterable[Row] | None = None
) -> Iterator[Row | LedgerLine]:
    """The first row of each kind, and a ledger line for every other; the line names the row that it repeats.

    With `valid`, `rows` are train rows: nothing of them is yielded, but the valid rows that are not among them.
    """
    with Spool() as spool:
        fingerprints = spooled(rows, spool, threshold, by)
        references = None if valid is None else len(spool)
        for row in valid or ():
            spool.add(row)
            fingerprints.add(normalised(text_of(row, by)))
        found = {d.number: d for d in duplicates(spool, fingerprints, by, references=references)}
        for number in range(references or 0, len(spool)):
            duplicate = found.get(number)
            yield _line(spool, duplicate, "duplicate" if valid is None else "leak") if duplicate else spool[number]


def _line(spool: Spool, duplicate: Duplicate, code: str) -> LedgerLine:
    source, line = spool.place(duplicate.of)
    how = "the same as" if duplicate.is_exact else f"{duplicate.similarity:.0%} like"
    code = code if duplicate.is_exact else f"near-{code}"
    return LedgerLine(*spool.place(duplicate.number), "dropped", code, f"{how} {source}:{line}")
