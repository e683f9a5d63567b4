"""`runs` lists what was trained, `runs show` tells one of them, `plot` draws its curves again."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.home import Home
from trainer.runs.run_folder import METRICS, list_runs, read_lines, read_run, run_state

COLUMNS = ("id", "state", "stage", "method", "loss", "eval", "time")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", shared: argparse.ArgumentParser) -> None:
    runs = commands.add_parser("runs", parents=[shared], help="list the runs, or show one")
    runs.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    runs.add_argument("id", nargs="?", metavar="ID", help="a run's id or folder, for show")
    runs.set_defaults(run=_runs)

    plot = commands.add_parser("plot", parents=[shared], help="draw a run's curves again, as PNG and CSV")
    plot.add_argument("id", metavar="ID", help="a run's id or folder")
    plot.set_defaults(run=_plot)


def run_folder(name: str, home: Home) -> Path:
    """The folder of a run's id or path. Raises ConfigError when there is no such run."""
    folder = Path(name).expanduser()
    for path in (folder, home.runs / name):
        if (path / "run.json").is_file():
            return path
    raise ConfigError(f"{name}: no such run; `python -m trainer runs` lists them")


def _runs(options: argparse.Namespace, home: Home) -> int:
    if options.action == "show":
        if not options.id:
            raise ConfigError(
                "runs show: name a run, for example `python -m trainer runs show 20260101-120000-sft-1a2b`"
            )
        print(_report(run_folder(options.id, home)))
        return 0
    rows = [_row(record) for record in list_runs(home.runs)]
    if not rows:
        print(f"no runs in {home.runs}")
        return 0
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    for row in [COLUMNS, *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _plot(options: argparse.Namespace, home: Home) -> int:
    folder = run_folder(options.id, home)
    from trainer.runs.curves import redraw

    redraw(folder)
    print(f"drawn in {folder}")
    return 0


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    config = record.get("config") or {}
    metrics = read_lines(Path(record["path"]) / METRICS)
    return (
        str(record.get("id", Path(record["path"]).name)),
        str(record["state"]),
        str(config.get("stage", "?")),
        str(config.get("finetuning_type", "?")),
        _figure(record.get("train_loss"), metrics, "loss"),
        _figure(record.get("eval_loss"), metrics, "eval_loss"),
        _duration(record),
    )


def _report(folder: Path) -> str:
    record = read_run(folder)
    lines = [f"folder: {folder}", f"state: {run_state(record)}", f"time: {_duration(record)}"]
    lines += [f"{key}: {_text(value)}" for key, value in record.items() if key not in ("state", "config")]
    lines.append("config:")
    config = record.get("config") or {}
    lines += [f"  {key}: {_text(value)}" for key, value in config.items() if value not in (None, [], {}, "")]
    metrics = read_lines(folder / METRICS)
    if metrics:
        lines.append(f"last metrics: {_text(metrics[-1])}")
    return "\n".join(lines)


def _duration(record: Mapping[str, Any]) -> str:
    started, ended = record.get("started"), record.get("ended")
    if not isinstance(started, int | float):
        return "?"
    if not isinstance(ended, int | float):
        if run_state(record) != "running":
            return "?"
        ended = time.time()
    minutes, seconds = divmod(max(0, int(ended - started)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figure(result: Any, metrics: list[dict[str, Any]], name: str) -> str:
    """The run's result, else the last value of its metrics. What is no number is shown as it is: nan is never 0."""
    value = result if result is not None else next((line[name] for line in reversed(metrics) if name in line), None)
    return "-" if value is None else f"{value:.4f}" if isinstance(value, int | float) else str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
