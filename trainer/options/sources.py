"""Where options come from: JSON, YAML and shell files, and words. Knows no option by its meaning."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from server.errors import ConfigError
from trainer.errors import ConfigFaults

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Layer:
    """Options of one place, as written. `lines` holds the line of a key where the place is a file."""

    place: str
    values: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        return f"{self.place}:{self.lines[key]}" if key in self.lines else self.place


def read_layer(file: Path) -> Layer:
    """A .json or .yaml file. Raises ConfigError naming file and line."""
    text = read_config_text(file)
    try:
        value = json.loads(text, object_pairs_hook=_unique) if file.suffix == ".json" else yaml.load(text, _Strict)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be parsed ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a mapping of options is expected, for example `stage: sft`")
    if "zero_optimization" in value:
        raise ConfigError(f"{file} is a DeepSpeed configuration: name it with deepspeed={file}")
    values = {str(key): item for key, item in value.items()}
    return Layer(str(file), values, {key: line for key in values if (line := _line_of(text, key))})


def read_config_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None


def word_layer(words: Sequence[str]) -> Layer:
    """`key=value` words. Raises ConfigFaults for one without an equals sign or given twice."""
    values: dict[str, Any] = {}
    faults = []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if not equals:
            faults.append(f"{word!r}: options are written key=value or --key value, for example num_train_epochs=3")
        elif key in values and values[key] != text:
            faults.append(f"{key} is given twice: {values[key]} and {text}")
        values[key] = text
    if faults:
        raise ConfigFaults(faults)
    return Layer(COMMAND_LINE, values)


def join_flags(arguments: Sequence[str], switches: frozenset[str], lists: frozenset[str]) -> list[str]:
    """`--key value`, `--key=value` and `--switch` -> `key=value` words; other words stay as they are.

    `switches` are keys that may stand alone, `lists` keys that take several values.
    """
    words: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or argument == "--":
            words.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            taken = _values_after(arguments, position, key in switches, key in lists)
            position += len(taken)
            value = ",".join(taken) if taken else "true"
        words.append(f"{key}={value}")
    return words


def _values_after(arguments: Sequence[str], start: int, is_switch: bool, is_list: bool) -> list[str]:
    taken: list[str] = []
    for argument in arguments[start:]:
        is_pair = re.match(r"[A-Za-z_]\w*=", argument) is not None
        if argument.startswith("--") or (is_pair and (is_switch or taken)):
            break
        if is_switch and argument.lower() not in ("true", "false", "yes", "no", "1", "0"):
            break
        taken.append(argument)
        if not is_list:
            break
    return taken


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(f"{double} is given twice")
    return dict(pairs)


class _Strict(yaml.SafeLoader):
    """A key that is given twice is an error, not a silent choice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _line_of(text: str, key: str) -> int | None:
    found = re.search(rf"^[ \t{{,]*[\"']?{re.escape(key)}[\"']?\s*:", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
