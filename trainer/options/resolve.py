"""Files and words -> one TrainConfig, with the source of every value. All faults are found before any is told.

Precedence: command line > flags of a script > its constants > default. Imports nothing heavy and reads no data.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigFaults
from trainer.machine import Machine, find_machine
from trainer.options.checks import given_faults, pair_faults, place_faults
from trainer.options.draft import Draft
from trainer.options.hf_names import PASSED
from trainer.options.hf_table import hf_table
from trainer.options.shell_file import UNSET, read_shell
from trainer.options.sources import COMMAND_LINE, Layer, join_flags, read_layer, word_layer
from trainer.options.translate import (
    HINTS,
    LISTS,
    OPTIONS,
    SWITCHES,
    is_known,
    shown,
)
from trainer.options.values import BadValue, check_range, convert
from trainer.options.zero import deepspeed_notes

_BAD = object()


@dataclass(frozen=True)
class Resolved:
    """`sources`: option -> where its value comes from. `notes`: one line per changed name, value or ignored option."""

    config: TrainConfig
    sources: Mapping[str, str]
    notes: tuple[str, ...]


def resolve(
    file: Path | None, words: Sequence[str] = (), *, stage: str | None = None, machine: Machine | None = None
) -> Resolved:
    """Read, translate, check. Raises ConfigFaults with every fault, or ConfigError when `file` cannot be read.

    `words` are `key=value` or `--key value`; `stage` is the command's own, as in `python -m trainer dpo`.
    """
    draft = Draft()
    for layer in _layers(file, join_flags(words, SWITCHES, LISTS)):
        draft.add(layer)
    if stage:
        draft.set_stage(stage)
    draft.derive()
    draft.fit(machine or find_machine())
    return _finish(draft)


def _layers(file: Path | None, words: Sequence[str]) -> list[Layer]:
    given = word_layer(words)
    if file is None:
        return [given]
    if file.suffix != ".sh":
        return [read_layer(file), given]
    scripts, used = read_shell(file, {key: str(value) for key, value in given.values.items()}, os.environ)
    # A word may set a variable of the script: it is then no option.
    rest = {key: value for key, value in given.values.items() if key not in used or is_known(key)}
    return [*scripts, Layer(COMMAND_LINE, rest)]


def _finish(draft: Draft) -> Resolved:
    """Convert and check everything. Raises ConfigFaults."""
    checked = {name: _checked(draft, name, raw) for name, raw in draft.values.items()}
    converted = {name: value for name, value in checked.items() if value is not _BAD}
    faulty = draft.values.keys() - converted.keys()
    # The checks read a stand-in with defaults where a value is wrong, so that one fault hides no other.
    stand_in: Any = SimpleNamespace(**(_defaults() | converted))
    faults = pair_faults(stand_in) + given_faults(stand_in, draft.sources) + place_faults(stand_in)
    # What only follows from a wrong value is not told as well.
    draft.faults += [line for line in faults if not any(re.search(rf"\b{name}\b", line) for name in faulty)]
    if draft.faults:
        raise ConfigFaults(tuple(dict.fromkeys(draft.faults)))
    config = TrainConfig(**converted)
    for line in deepspeed_notes(config):
        draft.note(line, line)
    sources = {name: draft.sources.get(name, "default") for name in OPTIONS}
    return Resolved(config, sources, draft.told())


def _checked(draft: Draft, name: str, raw: Any) -> Any:
    source = draft.sources[name]
    place = "" if source.startswith(COMMAND_LINE) else f"{source}: "
    if isinstance(raw, str) and UNSET in raw:
        variable = raw.split(UNSET)[1]
        draft.faults.append(f"{place}${variable} is not set: add {variable}=... or {name}=... to the command")
        return _BAD
    try:
        value = convert(raw, HINTS[name], whole=OPTIONS[name].metadata["whole"])
        check_range(value, OPTIONS[name].metadata)
        _check_names(name, value)
    except BadValue as error:
        draft.faults.append(f"{place}{name}={shown(raw)}: {error}")
        return _BAD
    return value


def _defaults() -> dict[str, Any]:
    return {name: {} if option.default is MISSING else option.default for name, option in OPTIONS.items()}


def _check_names(name: str, value: Any) -> None:
    """Values that transformers lists, not we. Raises BadValue with the nearest."""
    table = hf_table()
    accepted = {"optim": table.optimizers, "lr_scheduler_type": table.schedulers}.get(name)
    if accepted and value not in accepted:
        near = difflib.get_close_matches(str(value), accepted, n=1)
        raise BadValue(f"did you mean {near[0]}?" if near else f"accepted are {', '.join(accepted)}")
    if name == "hf_arguments" and (wrong := sorted(value.keys() - PASSED)):
        raise BadValue(f"{wrong[0]} is none of TrainingArguments that are passed on; write it as an option of its own")
