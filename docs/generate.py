"""Writes the tables in docs/operations.md that come from the code. `python -m docs.generate`; a test runs it too."""

import sys
from pathlib import Path

from server.engine.__main__ import SIGNALS as ENGINE_SIGNALS
from server.ops.supervisor import SIGNALS as SUPERVISOR_SIGNALS
from server.settings import Settings, is_secret, variable

PAGE = Path(__file__).resolve().parent / "operations.md"


def settings_table() -> str:
    rows = ["| Variable | Option | Default | Meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default in (None, ()) else f"`{field.default}`"
        meaning = (field.description or "") + (" Masked in `--print-config`." if is_secret(name) else "")
        rows.append(f"| `{variable(name)}` | `--{name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(rows)


def signal_table() -> str:
    rows = ["| Process | Signal | Effect |", "|---|---|---|"]
    for process, signals in (("supervisor", SUPERVISOR_SIGNALS), ("engine", ENGINE_SIGNALS)):
        for number, effect in signals.items():
            rows.append(f"| {process} | `{number.name.removeprefix('SIG')}` | {effect} |")
    return "\n".join(rows)


def generated(page: str) -> str:
    """The page with every marked table as the code has it now."""
    for name, table in (("settings", settings_table()), ("signals", signal_table())):
        start, end = f"<!-- generated: {name} -->", "<!-- end -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{table}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text("utf-8")), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
