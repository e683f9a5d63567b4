"""Where `publish` takes its evidence from: a report that is there, files to compare on, or the run's held-out rows."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from server.store.home import Home
from trainer.compare.comparison import read_comparison
from trainer.errors import DataError
from trainer.publish import Evidence, check_publishable
from trainer.results.adapter_folder import FoundAdapter

HELD_OUT = "held_out.jsonl"
CURE = (
    "compare on files of your own: publish … --domain likelihood=FILE, or `python -m trainer compare` and "
    "publish … --report DIR"
)
NO_ROWS = "the run held no rows out (val_size, val_file)"
NO_RUN = "of an adapter from elsewhere the held-out rows are not known"


def find_evidence(options: Namespace, folder: Path, base: str | None, home: Home) -> tuple[Evidence | None, str]:
    """`options`: those of `publish`; `folder` and `base`: what they name. Without `--report` and `--domain` the run's
    held-out rows are the domain; where there are none, the second says why.

    What cannot be published is refused before anything is measured. Raises as `check_publishable`, and DataError, and
    what evaluating raises.
    """
    found, _ = check_publishable(folder, options.name, home, base)
    if options.report:
        return _read(options.report), ""
    if options.domain:
        return _compared(found, home, options, options.domain), ""
    with TemporaryDirectory(prefix="qloop-") as work:
        rows, note = Path(work) / HELD_OUT, ""
        domain = [f"likelihood={rows}"]
        try:
            _write_held_out(found, rows)
        except DataError as error:
            domain, note = [], f"no evidence for the domain: {error}; {CURE}"
        if not (domain or options.general or options.task):
            return None, note
        return _compared(found, home, options, domain), note


def _write_held_out(found: FoundAdapter, rows: Path) -> None:
    """Raises DataError where there are none."""
    from trainer.held_out import write_held_out

    if not found.run:
        raise DataError(NO_RUN)
    count = write_held_out(found.record, found.base, rows)
    if not count:
        raise DataError(NO_ROWS)
    print(f"evidence: the reference answers of the run's {count} held-out rows", file=sys.stderr)


def _compared(found: FoundAdapter, home: Home, options: Namespace, domain: Sequence[str]) -> Evidence:
    from trainer.compare.run import Request, compare
    from trainer.evaluate.open_candidate import CandidateOptions

    request = Request(
        candidates=[_name(found.base, home), options.source],
        domain=domain,
        general=options.general,
        others=options.task,
        options=CandidateOptions(base=str(found.base)),
    )
    _, report = compare(
        request,
        home,
        output=options.output,
        language=options.language or "en",
        say=lambda text: print(text, file=sys.stderr),
    )
    print(f"report: {report}", file=sys.stderr)
    return _read(report)


def _name(base: Path, home: Home) -> str:
    """Of a model in the home its name, for the report's sake."""
    return base.name if base.resolve().parent == home.models.resolve() else str(base)


def _read(folder: Path) -> Evidence:
    comparison, report_hash = read_comparison(folder)
    return Evidence(comparison=comparison, report_hash=report_hash)
