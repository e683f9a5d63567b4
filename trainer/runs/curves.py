"""The curves of a run: `curves.csv` and `curves.png` beside its metrics.jsonl. Knows no trainer and no torch."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.store.hashes import write_text
from trainer.runs.run_folder import METRICS, read_lines, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV, PNG = "curves.csv", "curves.png"
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
)
PANELS = (("loss", "eval_loss"), ("perplexity",), ("learning_rate",), ("grad_norm",))
TASK_MARK = "/"  # in the names of what eval_tasks measure, as choice/mmlu/accuracy, and in no other


def redraw(run: Path) -> Path:
    """Write both files anew from metrics.jsonl and return the picture's path. Raises ConfigError: no run folder."""
    title = str(read_run(run).get("id", run.name))
    rows = read_curves(run)
    write_text(run / CSV, _csv(rows))
    _write_png(run / PNG, rows, title)
    return run / PNG


def read_curves(run: Path) -> list[dict[str, float]]:
    """One row per step, evaluation and training together; a number that is not finite stays what it is."""
    by_step: dict[int, dict[str, float]] = {}
    for line in read_lines(run / METRICS):
        if isinstance(step := line.get("step"), int):
            by_step.setdefault(step, {}).update(_numbers(line))
    return [by_step[step] for step in sorted(by_step)]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """metrics.jsonl writes a number that is not finite as text."""
    found = {}
    for key in (*COLUMNS, *(key for key in line if TASK_MARK in key)):
        value = line.get(key)
        if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
            found[key] = float(value) if isinstance(value, str) else value
    return found


def _csv(rows: Sequence[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, *_task_columns(rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _task_columns(rows: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if TASK_MARK in key))


def _panels(rows: Sequence[dict[str, float]]) -> list[tuple[str, ...]]:
    """Names of curves, panel by panel: tasks that are measured alike share one."""
    by_metric: dict[str, list[str]] = {}
    for name in _task_columns(rows):
        by_metric.setdefault(name.rpartition(TASK_MARK)[2], []).append(name)
    return [*PANELS, *map(tuple, by_metric.values())]


def _write_png(path: Path, rows: Sequence[dict[str, float]], title: str) -> None:
    # Agg by itself: no display, no global state, and no second thread of a caller in between.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    height = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.5 * height), dpi=100, layout="constrained")
    figure.suptitle(title)
    for number, names in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(height, 2, number), names, rows)
    aside = path.with_name(f".{path.name}.part")
    FigureCanvasAgg(figure).print_png(aside)  # type: ignore[no-untyped-call]
    os.replace(aside, path)


def _draw_panel(axes: "Axes", names: Sequence[str], rows: Sequence[dict[str, float]]) -> None:
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        good = [(step, value) for step, value in points if math.isfinite(value)]
        if good:
            # One point has no line.
            axes.plot(*zip(*good, strict=True), label=name, marker="." if len(good) < 50 else "")
        for step, value in points:
            if not math.isfinite(value):
                axes.axvline(step, color="red", linestyle=":", label=f"{name} is {value}")
    axes.set_title(" and ".join(names))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center")
