"""Statistics as pictures, each with the same numbers as CSV beside it. Knows nothing about rows.

Words that no font of the machine can draw are replaced by their number in the CSV, and the caller is told: a plot
never shows boxes.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen first

from trainer.data.stats import LabelShare, Lengths
from trainer.runs.chart_font import INSTALL_HINT, font_for

MAX_BARS = 40
NUM_BINS = 50


def draw_labels(shares: Sequence[LabelShare], title: str, folder: Path) -> list[str]:
    """`labels.png` and `labels.csv`; the long tail in another colour. Returns warnings for the user."""
    with (folder / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:  # with a mark, for Excel
        table = csv.writer(file)
        table.writerow(["number", "label", "count", "share", "cumulative", "is_tail"])
        for number, s in enumerate(shares, start=1):
            table.writerow([number, s.label, s.count, f"{s.share:.6f}", f"{s.cumulative:.6f}", int(s.is_tail)])
    shown = _fitting(shares)
    words = [share.label for share in shown]
    font = font_for([*words, title])
    warnings = []
    if font is None:
        words, title = [f"#{shares.index(share) + 1}" for share in shown], "labels by their number in labels.csv"
        warnings.append(f"no font of this machine has the labels' characters, so the plot numbers them: {INSTALL_HINT}")
    with plt.rc_context({"font.family": font or "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(8, max(2.5, 0.28 * len(shown) + 1)), layout="constrained")
        bars = axes.barh(range(len(shown)), [s.count for s in shown], color=[_colour(s) for s in shown])
        axes.bar_label(bars, [f"{share.count}  {share.share:.1%}" for share in shown], padding=3, fontsize=8)
        axes.set_yticks(range(len(shown)), words)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("rows (orange: the long tail)")
        axes.set_title(title)
        figure.savefig(folder / "labels.png", dpi=120)
    plt.close(figure)
    return warnings


def draw_lengths(lengths: dict[str, Lengths], folder: Path) -> None:
    """`lengths.png`, one histogram each up to the 99th percentile, and `lengths.csv` with every length's count."""
    with (folder / "lengths.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["of", "length", "count"])
        for name, one in lengths.items():
            table.writerows([name, length, count] for length, count in sorted(one.counts.items()))
    figure, grid = plt.subplots(len(lengths), 1, figsize=(8, 2.2 * len(lengths)), layout="constrained", squeeze=False)
    for axes, (name, one) in zip(grid[:, 0], lengths.items(), strict=True):
        most = max(1, one.percentile(99))
        least = min(one.counts, default=0)
        step = -(-(most + 1 - least) // NUM_BINS)  # whole numbers fall in the middle of bars of equal width
        edges = [edge - 0.5 for edge in range(least, most + step + 1, step)]
        kept = {length: count for length, count in one.counts.items() if length <= most}
        axes.hist(list(kept), bins=edges, weights=list(kept.values()))
        for percent, style in ((50, "-"), (95, "--")):
            at = one.percentile(percent)
            axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"p{percent} = {at}")
        unit = "" if name in ("tokens", "turns") else ", characters"
        axes.set_title(f"{name}{unit} (up to p99 = {most}, longest {max(one.counts, default=0)})", fontsize=9)
        axes.legend(fontsize=8)
    figure.savefig(folder / "lengths.png", dpi=120)
    plt.close(figure)


def _fitting(shares: Sequence[LabelShare]) -> list[LabelShare]:
    """Head and tail of a list too long to draw."""
    if len(shares) <= MAX_BARS:
        return list(shares)
    return [*shares[: MAX_BARS - 10], *shares[-10:]]


def _colour(share: LabelShare) -> str:
    return "tab:orange" if share.is_tail else "tab:blue"
