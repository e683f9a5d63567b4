"""The report's pictures as SVG text: no library, no request, colours from the page's own style sheet."""

from collections.abc import Sequence
from html import escape

from trainer.compare.comparison import Comparison
from trainer.compare.metrics import metric_of
from trainer.evaluate.results import Interval

WIDTH, LABEL, VALUE, ROW = 760, 250, 150, 26
_PLOT = WIDTH - LABEL - VALUE


def differences_plot(comparison: Comparison) -> str:
    """One line per task and candidate: its main score's gain, in shares of its own range, right is better."""
    lines = []
    for task in comparison.tasks:
        row, metric = task.main_row, metric_of(task.main_metric)
        for number, found in enumerate(row.differences if row else (), 1):
            if found is not None and metric.direction:
                name = comparison.candidates[number].name
                label = task.task if len(comparison.candidates) == 2 else f"{task.task}, {name}"
                lines.append((label, found.gain, found.verdict, metric.show_difference(found.interval.mean)))
    if not lines:
        return ""
    shapes = []
    for number, (label, gain, verdict, text) in enumerate(lines):
        # Each line has a scale of its own: percent and nats have none in common. 0 is in the middle of all.
        reach = max(abs(gain.low), abs(gain.high)) or 1.0
        middle = LABEL + _PLOT / 2
        places = [middle + value / reach * (_PLOT / 2 - 6) for value in (gain.low, gain.mean, gain.high)]
        y = _middle(number)
        shapes.append(_label(label, y) + _whisker(places[0], places[2], y, verdict))
        shapes.append(f'<circle class="{verdict}" cx="{places[1]:.1f}" cy="{y}" r="5"/>' + _value(text, y))
    middle = LABEL + _PLOT / 2
    zero = f'<line class="zero" x1="{middle}" x2="{middle}" y1="0" y2="{ROW * len(lines) + 8}"/>'
    return _svg(zero + "".join(shapes), len(lines), "differences")


def scores_plot(comparison: Comparison) -> str:
    """Bars of the main score per task and candidate, for scores that are shares of 1."""
    bars: list[tuple[str, int, Interval]] = []
    for task in comparison.tasks:
        row = task.main_row
        if row is None or metric_of(task.main_metric).scale != "share":
            continue
        for number, value in enumerate(row.values):
            if value is not None:
                bars.append((f"{task.task}, {comparison.candidates[number].name}", number, value))
    shapes = []
    for place, (label, number, value) in enumerate(bars):
        y, wide = _middle(place), _PLOT * min(max(value.mean, 0.0), 1.0)
        shapes.append(_label(label, y))
        shapes.append(f'<rect class="c{number % 4}" x="{LABEL}" y="{y - 8}" width="{wide:.1f}" height="16"/>')
        if value.low is not None and value.high is not None:
            ends = [LABEL + _PLOT * min(max(end, 0.0), 1.0) for end in (value.low, value.high)]
            shapes.append(_whisker(ends[0], ends[1], y, "mark"))
        shapes.append(_value(f"{100 * value.mean:.1f}", y))
    return _svg("".join(shapes), len(bars), "scores") if bars else ""


def subjects_plot(names: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """One line per subject, a dot per candidate, 0 to 1."""
    shapes = []
    for place, (subject, values) in enumerate(rows):
        y = _middle(place)
        shapes.append(_label(subject, y) + f'<line class="grid" x1="{LABEL}" x2="{LABEL + _PLOT}" y1="{y}" y2="{y}"/>')
        for number, value in enumerate(values):
            if value is not None:
                x = LABEL + _PLOT * min(max(value, 0.0), 1.0)
                shapes.append(f'<circle class="c{number % 4}" cx="{x:.1f}" cy="{y}" r="5"/>')
        shapes.append(_value(" / ".join("–" if one is None else f"{100 * one:.0f}" for one in values), y))
    return _svg("".join(shapes), len(rows), ", ".join(names)) if rows else ""


def _middle(row: int) -> int:
    return ROW * row + ROW // 2 + 4


def _label(text: str, y: int) -> str:
    short = text if len(text) <= 36 else text[:35] + "…"
    return f'<text class="label" x="{LABEL - 10}" y="{y + 4}">{escape(short)}</text>'


def _value(text: str, y: int) -> str:
    return f'<text x="{LABEL + _PLOT + 12}" y="{y + 4}">{escape(text)}</text>'


def _whisker(low: float, high: float, y: int, kind: str) -> str:
    ends = "".join(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5}" y2="{y + 5}"/>' for x in (low, high))
    return f'<g class="{kind}"><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{ends}</g>'


def _svg(inner: str, rows: int, name: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {ROW * rows + 8}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{escape(name, quote=True)}">{inner}</svg>'
