"""One option as somebody wrote it -> our options. Knows all names: ours, other tools', transformers'."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from trainer.config import TrainConfig
from trainer.options.aliases import NOTED, RULES, SWITCH_RULES, translate_value
from trainer.options.hf_names import FIXED, GONE, PASSED, check_fixed, check_gone, passed_value
from trainer.options.hf_table import hf_table
from trainer.options.values import BadValue

OPTIONS = {option.name: option for option in fields(TrainConfig)}
HINTS = get_type_hints(TrainConfig)
ALSO = {name: option.name for option in OPTIONS.values() for name in option.metadata["also"]}
# Other tools' options that mean something only together with another one; they never reach TrainConfig.
HELPERS = ("dataset_dir", "offload")
REFUSED: Mapping[str, str] = {
    "data_split": "cut the file beforehand with `python -m trainer data split`, then name the part",
    "adapter_name_or_path": "training goes on from a run's checkpoint: set resume; or merge the adapter first",
    "modules_to_save": "an adapter with whole modules in it cannot be served by vLLM",
    "additional_target": "an adapter with whole modules in it cannot be served by vLLM",
    "resize_vocab": "an adapter with a changed vocabulary cannot be served by vLLM",
    "rope_scaling": "positions are those of the base model",
}
# Keys that may stand without a value, and keys that take several.
SWITCHES = (
    frozenset(name for name, hint in HINTS.items() if bool in (hint, *get_args(hint)))
    | frozenset(name for name, kind in hf_table().arguments.items() if kind == "bool")
    | SWITCH_RULES
)
_LISTS = frozenset(name for name, hint in HINTS.items() if hint == tuple[str, ...] and name != "sample_prompts")
LISTS = _LISTS | frozenset(name for name, option in ALSO.items() if option in _LISTS)


class UnknownOption(BadValue):
    """The text is the whole fault, with the nearest name."""


@dataclass(frozen=True)
class Translated:
    """Our options with values as written, and the line to print if anything changed."""

    options: Mapping[str, Any]
    note: str = ""


def is_known(key: str) -> bool:
    known = (OPTIONS, ALSO, RULES, NOTED, HELPERS, REFUSED, GONE, hf_table().arguments)
    return any(key in names for names in known)


def translate(key: str, raw: Any) -> Translated:
    """Raises BadValue for a value that cannot be taken, UnknownOption for a key that nobody knows."""
    if key in OPTIONS or key in ALSO:
        return _with_note(key, raw, translate_value(ALSO.get(key, key), raw))
    if key in RULES:
        return _with_note(key, raw, RULES[key](raw))
    if key in HELPERS:
        return Translated({key: raw})
    if key in NOTED:
        return Translated({}, f"{key}: {NOTED[key]}")
    if key in PASSED:
        return Translated({"hf_arguments": {key: passed_value(key, raw, hf_table().arguments[key])}})
    if key in FIXED:
        check_fixed(key, raw)
        return Translated({}, f"{key}: {shown(raw)} is what the trainer always does")
    if key in GONE:
        check_gone(key, raw)
        return Translated({}, f"{key}: {shown(raw)} changes nothing")
    if key in REFUSED:
        raise BadValue(REFUSED[key])
    raise UnknownOption(unknown(key))


def unknown(key: str) -> str:
    names = [*OPTIONS, *ALSO, *RULES, *NOTED, *hf_table().arguments]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not near:
        return f"unknown option {key!r}: `python -m trainer train --help` lists all options"
    return f"unknown option {key!r}: did you mean {ALSO.get(near[0], near[0])}?"


def shown(value: Any) -> str:
    """A value as a user would write it."""
    if value in (None, "", ()) or value == {}:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _with_note(key: str, raw: Any, options: Mapping[str, Any]) -> Translated:
    if key in options and options[key] == raw:
        return Translated(options)
    if key in options:
        return Translated(options, f"{key}: {shown(raw)} -> {shown(options[key])}")
    if options:
        named = ", ".join(f"{name}: {shown(value)}" for name, value in options.items())
        return Translated(options, f"{key} -> {named}")
    return Translated(options, f"{key}: {shown(raw)} changes nothing")
