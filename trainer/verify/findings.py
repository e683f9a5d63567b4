"""What a check found: one line each, with its cure where there is one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fault"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`cure` says what to do about a fault."""

    check: str
    state: State
    detail: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.detail}; {self.cure}" if self.cure else self.detail


def ok(check: str, detail: str) -> Finding:
    return Finding(check=check, state="ok", detail=detail)


def note(check: str, detail: str) -> Finding:
    return Finding(check=check, state="note", detail=detail)


def fault(check: str, detail: str, cure: str = "") -> Finding:
    return Finding(check=check, state="fault", detail=detail, cure=cure)


def table(findings: Iterable[Finding]) -> str:
    """Aligned lines for a terminal."""
    rows = [(one.check, one.state.upper() if one.state == "fault" else one.state, str(one)) for one in findings]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}" for row in rows)
