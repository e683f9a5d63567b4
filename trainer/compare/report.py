"""A comparison written down: report.json for programs, report.md and report.html for people."""

from dataclasses import asdict
from pathlib import Path

from server.store.hashes import write_json, write_text
from trainer.compare.comparison import REPORT_HTML, REPORT_JSON, REPORT_MD, Comparison
from trainer.compare.markdown import markdown
from trainer.compare.page import page
from trainer.compare.words import Words


def write_report(comparison: Comparison, folder: Path, language: str) -> None:
    """The three files in `folder`; report.json is the last, so where it is, all are. Raises ConfigError."""
    words = Words(language)
    write_text(folder / REPORT_MD, markdown(comparison, words))
    write_text(folder / REPORT_HTML, page(comparison, words))
    write_json(folder / REPORT_JSON, asdict(comparison))
