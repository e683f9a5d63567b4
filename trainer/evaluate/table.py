"""An evaluation's figures for the screen."""

from trainer.evaluate.results import EvalResult, Interval, TaskResult

COLUMNS = ("task", "metric", "score", "95 %", "items")


def table(result: EvalResult) -> list[str]:
    """Every task's metrics with their intervals, the main one first; then what is worth knowing beside them."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for task in result.tasks:
        rows += _rows(task)
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    candidate = result.candidate
    who = ", ".join(part for part in (candidate.model, candidate.adapter, candidate.engine) if part)
    speed = result.speed.get("items_per_s", 0.0)
    notes = [line for task in result.tasks for line in _notes(task)]
    return [f"{candidate.name}: {who}", "", *lines, *(["", *notes] if notes else []), "", f"{speed:.1f} items/s"]


def _rows(task: TaskResult) -> list[tuple[str, ...]]:
    """A metric that no item has, because none was answered, has no figure."""
    others = [name for name in task.metrics if name != task.main_metric]
    rows: list[tuple[str, ...]] = []
    for name in (task.main_metric, *others):
        found = task.metrics.get(name)
        shown = ("-", "-") if found is None else (figure(found.mean), span(found))
        rows.append(("", name, *shown, ""))
    rows[0] = (task.task, *rows[0][1:-1], str(task.num_scored))
    return rows


def figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def span(found: Interval) -> str:
    """Of one item there is none."""
    return "-" if found.low is None or found.high is None else f"{figure(found.low)} … {figure(found.high)}"


def _notes(task: TaskResult) -> list[str]:
    notes = task.notes
    lines = []
    if task.refused:
        lines.append(f"{sum(task.refused.values())} refused ({_counts(task.refused)})")
    lines += [f"cannot be scored: {broken}" for broken in notes.get("broken", ())]
    if notes.get("num_errors"):
        lines.append(f"{notes['num_errors']} not answered ({_counts(notes['errors'])})")
    if notes.get("num_short"):
        lines.append(f"{notes['num_short']} had fewer than {notes['shots']} examples: their subjects have no more")
    if notes.get("num_unreadable"):
        lines.append(f"{notes['num_unreadable']} of {notes['num_written']} written answers name no option")
    if notes.get("num_multiple") and notes.get("by") == "logprob":
        lines.append(f"{notes['num_multiple']} questions with several right options were answered in writing")
    spread = (notes.get("position_bias") or {}).get("spread")
    if spread is not None:
        shares = ", ".join(
            f"{letter} {100 * share:.0f} %" for letter, share in notes["position_bias"]["shares"].items()
        )
        lines.append(f"places chosen: {shares}; spread of recall {spread:.3f}")
    return [f"{task.task}: {line}" for line in lines]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} x {code}" for code, number in counts.items())
