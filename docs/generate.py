"""Writes the tables of the documentation that come from the code or from a run. A test runs it too.

`python -m docs.generate`. What the table of agreement says was measured by
`python -m tests.server.engine.backends.matrix`, which leaves its results in docs/agreement.json; with vLLM beside it
`python -m tests.server.engine.backends.vllm_matrix`, in docs/agreement_vllm.json; that of methods by
`python -m tests.trainer.method_matrix`, in docs/methods.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.__main__ import SIGNALS as ENGINE_SIGNALS
from server.engine.messages import EngineStats
from server.ops.metrics import PROCESS_REGISTRY, EngineCounters
from server.ops.supervisor import SIGNALS as SUPERVISOR_SIGNALS
from server.settings import Settings, is_secret, variable

HERE = Path(__file__).resolve().parent
AGREEMENT = HERE / "agreement.json"
METHODS = HERE / "methods.json"
AGREEMENT_VLLM = HERE / "agreement_vllm.json"

Cell = dict[str, Any]


def settings_table() -> str:
    rows = ["| Variable | Option | Default | Meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default in (None, ()) else f"`{field.default}`"
        meaning = (field.description or "") + (" Masked in `--print-config`." if is_secret(name) else "")
        rows.append(f"| `{variable(name)}` | `--{name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(rows)


def metrics_table() -> str:
    found = [*PROCESS_REGISTRY.collect(), *EngineCounters(EngineStats()).collect()]
    rows = ["| Metric | Kind | Meaning |", "|---|---|---|"]
    for metric in sorted(found, key=lambda metric: metric.name):
        name = metric.name + ("_total" if metric.type == "counter" else "")
        rows.append(f"| `{name}` | {metric.type} | {metric.documentation} |")
    return "\n".join(rows)


def signal_table() -> str:
    rows = ["| Process | Signal | Effect |", "|---|---|---|"]
    for process, signals in (("supervisor", SUPERVISOR_SIGNALS), ("engine", ENGINE_SIGNALS)):
        for number, effect in signals.items():
            rows.append(f"| {process} | `{number.name.removeprefix('SIG')}` | {effect} |")
    return "\n".join(rows)


def agreement_table() -> str:
    """Families x adapter methods: how many greedy tokens were compared with the stock libraries', all of them equal."""
    result = json.loads(AGREEMENT.read_text("utf-8"))
    note = ", each with " + "; ".join(result["variants"]) + "."
    return _grid(result, note, _agreement_cell, refused="PEFT: no", reason="peft_raised")


def agreement_vllm_table() -> str:
    """Families x adapters for each engine that runs in vLLM's environment."""
    result = json.loads(AGREEMENT_VLLM.read_text("utf-8"))
    rows = {
        f"{family}, `{engine}`": cells
        for family, engines in result["cells"].items()
        for engine, cells in engines.items()
    }
    return _grid({**result, "cells": rows}, ".", _agreement_cell, refused="PEFT: no", reason="peft_raised")


def _agreement_cell(cell: Cell) -> str:
    return f"{cell['num_compared']} of {cell['num_tokens']}"


def methods_table() -> str:
    """Families x training methods: who serves the result, and how many of its greedy tokens were compared."""
    result = json.loads(METHODS.read_text("utf-8"))
    gaps: dict[str, float] = {}
    for cells in result["cells"].values():
        for column, cell in cells.items():
            gaps[column] = max(gaps.get(column, 0.0), cell["reload_gap"])
    exact = max(gap for column, gap in gaps.items() if "int8" not in column)
    note = (
        f". Loading changed a loss by {exact:.0e} at most, and by {max(gaps.values()):.0e} in int8, which rounds by "
        "what else is in a batch."
    )
    return _grid(result, note, _methods_cell, refused="refused", reason="refused")


def _methods_cell(cell: Cell) -> str:
    return f"{', '.join(cell['engines']) or 'merged'}: {cell['num_compared']} of {cell['num_tokens']}"


def _grid(result: dict[str, Any], note: str, show: Callable[[Cell], str], *, refused: str, reason: str) -> str:
    """A run's cells, a row for each family; what could not be done says `refused`, and below why (`cell[reason]`)."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    columns = list(next(iter(result["cells"].values())))
    rows = [
        f"Run on {result['date']} ({result['machine']}; {versions}){note}",
        "",
        f"| Family | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    refusals = []
    for family, cells in result["cells"].items():
        texts = [refused if cells[column].get(reason) else show(cells[column]) for column in columns]
        rows.append(f"| {family} | {' | '.join(texts)} |")
        refusals += [
            f"\n{refused} — {family}, {column}: `{cell[reason]}`" for column, cell in cells.items() if cell.get(reason)
        ]
    return "\n".join([*rows, *refusals])


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    HERE / "operations.md": {"settings": settings_table, "signals": signal_table, "metrics": metrics_table},
    HERE / "engines.md": {"agreement_vllm": agreement_vllm_table, "agreement": agreement_table},
    HERE / "training.md": {"methods": methods_table},
}


def generated(path: Path) -> str:
    """The page at `path` with every table of it as the code has it now. Raises ValueError where a marker is missing."""
    page = path.read_text("utf-8")
    for name, table in TABLES[path].items():
        start, end = f"<!-- generated: {name} -->", "<!-- end -->"
        before, marker, rest = page.partition(start)
        if not marker:
            raise ValueError(f"{path} lacks the line {start}")
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{table()}\n{end}{after}"
    return page


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(generated(path), "utf-8")
        print(f"wrote {path}", file=sys.stderr)
