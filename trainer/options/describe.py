"""The options as text: for `--help`, and for `--print-config` with their values and sources."""

from dataclasses import MISSING
from typing import Any, get_args

from trainer.options.resolve import Resolved
from trainer.options.translate import HINTS, OPTIONS, shown


def describe(resolved: Resolved) -> str:
    """`--print-config`: each value with its source."""
    rows = [(name, shown(getattr(resolved.config, name)), resolved.sources[name]) for name in OPTIONS]
    widths = [min(max(len(row[column]) for row in rows), 40) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def describe_options() -> str:
    """Every option: name, accepted values, meaning, default."""
    lines = []
    for option in OPTIONS.values():
        choices = [str(choice) for choice in _leaves(HINTS[option.name])]
        accepted = f" {{{'|'.join(choices)}}}" if choices else ""
        default = None if option.default is MISSING else option.default
        lines.append(f"  {option.name}{accepted}\n      {option.metadata['help']} [{shown(default)}]")
    return "\n".join(lines)


def _leaves(hint: Any) -> list[Any]:
    """The values of a Literal, also inside `| None`."""
    if isinstance(hint, str | int):
        return [hint]
    return [leaf for part in get_args(hint) for leaf in _leaves(part)]
