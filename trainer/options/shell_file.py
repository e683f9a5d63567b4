"""A shell script that starts somebody's training -> the options in it. The script is read, never run.

Understood are assignments, one launching command (over several lines with `\\`), variables, and the date. Any other
line is named in a note and left alone.
"""

import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from server.errors import ConfigError
from trainer.options.aliases import CONSTANTS
from trainer.options.sources import Layer, join_flags, read_config_text
from trainer.options.translate import LISTS, SWITCHES

LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "llamafactory-cli", "swift", "python", "python3")
UNSET = "\0"  # around the name of a variable that nobody has set; no file name or option holds it

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?::-([^}]*))?\}|([A-Za-z_]\w*))")
_DATE = re.compile(r"\$\(\s*date\s+[\"']?\+([^)\"']+)[\"']?\s*\)|`\s*date\s+[\"']?\+([^`\"']+)[\"']?\s*`")
_SKIPPED = ("set", "cd", "echo", "mkdir", "source", "conda", "module", "wait", ".")


def read_shell(file: Path, given: Mapping[str, str], environment: Mapping[str, str]) -> tuple[list[Layer], set[str]]:
    """Layers, the weaker first: constants, then the command's flags; and the names of the variables that it uses.

    A variable is looked up in the script, then in `given` (words of the command line), then in `environment`.
    Raises ConfigError when there is no training command, or more than one.
    """
    text = _DATE.sub(lambda m: time.strftime(m[1] or m[2]), read_config_text(file))
    constants: dict[str, str] = {}
    used: set[str] = set()
    lines: dict[str, int] = {}
    commands: list[tuple[int, list[str]]] = []
    notes: list[str] = []
    for number, line in _logical_lines(text):
        expanded = _expand(line, {**given, **constants}, environment, used)
        words = _split(expanded, f"{file}:{number}")
        names = [match for word in words if (match := _ASSIGNMENT.fullmatch(word))]
        if words and len(names) == len([word for word in words if word != "export"]):
            for match in names:
                constants[match[1]] = match[2]
                lines[match[1]] = number
        elif _launcher(words):
            commands.append((number, words))
        elif words:
            why = "is not an option" if words[0] in _SKIPPED else "is not understood"
            notes.append(f"{file}:{number}: `{words[0]}` {why}; the line is left alone")
    if len(commands) != 1:
        raise ConfigError(
            f"{file}: {len(commands)} training commands found, one is expected ({', '.join(LAUNCHERS[:4])} or python)"
        )
    number, words = commands[0]
    flags, launcher = _flags(words, f"{file}:{number}")
    notes += launcher
    options = {CONSTANTS[name]: value for name, value in constants.items() if name in CONSTANTS}
    notes += [f"{name} -> {CONSTANTS[name]}: {value}" for name, value in constants.items() if name in CONSTANTS]
    notes += [
        f"{file}:{lines[name]}: {name} names no option; it is left alone"
        for name in constants
        if name not in CONSTANTS and name not in used
    ]
    first = Layer(str(file), options, {CONSTANTS[n]: lines[n] for n in constants if n in CONSTANTS}, tuple(notes))
    return [first, Layer(str(file), flags, dict.fromkeys(flags, number))], used


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """(number of the first line, the line with its continuations)"""
    joined: list[tuple[int, str]] = []
    continues = False
    for number, line in enumerate(text.splitlines(), start=1):
        if continues:
            start, before = joined[-1]
            joined[-1] = (start, before + " " + line.rstrip().removesuffix("\\"))
        else:
            joined.append((number, line.rstrip().removesuffix("\\")))
        continues = line.rstrip().endswith("\\")
    return joined


def _expand(line: str, values: Mapping[str, str], environment: Mapping[str, str], used: set[str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        used.add(name)
        return values.get(name, environment.get(name, match[2] or f"{UNSET}{name}{UNSET}"))

    return _VARIABLE.sub(value, line)


def _split(line: str, place: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{place}: cannot be read as a shell command ({error})") from None


def _launcher(words: list[str]) -> bool:
    plain = [word for word in words if not _ASSIGNMENT.fullmatch(word)]
    return bool(plain) and Path(plain[0]).name in LAUNCHERS


def _flags(words: list[str], place: str) -> tuple[dict[str, str], list[str]]:
    """The options after the script's name (or after `llamafactory-cli train`), and notes on the words before."""
    plain = [word for word in words if not _ASSIGNMENT.fullmatch(word)]
    notes = [
        f"{place}: {word.partition('=')[0]} is not set by the trainer; set it for the command itself"
        for word in words[: len(words) - len(plain)]
    ]
    name = Path(plain[0]).name
    if name in ("llamafactory-cli", "swift"):
        start = 2 if len(plain) > 1 and not plain[1].startswith("-") else 1
        flags = {"stage": plain[1]} if plain[1:2] in (["pt"], ["sft"]) else {}
    else:
        script = next((at for at, word in enumerate(plain) if word.endswith(".py")), 0)
        start = script + 1
        flags = {}
        processes = re.search(r"--(?:nproc[_-]per[_-]node|num_gpus|num_processes)[= ]+(\d+)", " ".join(plain[:script]))
        if processes:
            flags["num_processes"] = processes[1]
    for word in join_flags(plain[start:], SWITCHES, LISTS):
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{place}: {word!r} belongs to no option")
        if key in flags and flags[key] != value:
            raise ConfigError(f"{place}: {key} is given twice: {flags[key]} and {value}")
        flags[key] = value
    return flags, notes
