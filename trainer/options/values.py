"""A raw value of a file or a word -> the type that an option declares. Knows types and ranges, no option by name."""

import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

FLAGS: Mapping[Any, bool] = {
    True: True,
    False: False,
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}


class BadValue(ValueError):
    """Why a value cannot be taken; the text says what is accepted."""


def convert(value: Any, hint: Any, *, whole: bool = False) -> Any:
    """`value` as `hint` says. Raises BadValue. An empty text means unset where that is possible."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        unset = value is None or (isinstance(value, str) and value.lower() in ("", "none", "null"))
        return None if unset else convert(value, get_args(hint)[0])
    if origin is Literal:
        return _choice(value, get_args(hint))
    if origin is tuple:
        return _texts(value, whole)
    if origin is not None:  # Mapping[str, Any]
        return _mapping(value)
    return _scalar(value, hint)


def check_range(value: Any, limits: Mapping[str, Any]) -> None:
    """Raises BadValue for a number outside of `least`, `most`, `above`, or one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most, above = limits["least"], limits["most"], limits["above"]
    inside = (least is None or value >= least) and (most is None or value <= most) and (above is None or value > above)
    if not inside or not math.isfinite(value):
        named = (("at least", least), ("above", above), ("at most", most))
        bounds = " and ".join(f"{word} {limit:g}" for word, limit in named if limit is not None)
        raise BadValue(f"must be {bounds or 'finite'}")


def flag(value: Any) -> bool:
    """true, false and YAML's other words for them. Raises BadValue."""
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, bool | str) or key not in FLAGS:
        raise BadValue("accepted are true and false")
    return FLAGS[key]


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value is False and "no" in choices:  # what YAML makes of an unquoted no
        return "no"
    for choice in choices:
        if not isinstance(value, bool) and str(value) == str(choice):
            return choice
    near = difflib.get_close_matches(str(value), list(map(str, choices)), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise BadValue(f"accepted are {', '.join(map(str, choices))}{hint}")


def _texts(value: Any, whole: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value] if whole else value.split(",")
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(part.strip() for part in value if part.strip())
    raise BadValue("a text or a list of texts is expected")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            value = None
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    raise BadValue('a mapping is expected, for example {"peft_type": "OFT", "r": 8}')


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        return flag(value)
    if kind is str and isinstance(value, str):
        return value
    number = None if kind is str else _number(value, kind)
    if number is None:
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise BadValue(f"{words[kind]} is expected")
    return number


def _number(value: Any, kind: type) -> Any:
    """A YAML reader takes 1e-4 for text and 1e3 for no whole number, so both forms arrive here."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
        if kind is float:
            return number
        return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else _whole(number)
    except ValueError:
        return None


def _whole(number: float) -> int | None:
    return int(number) if math.isfinite(number) and number == int(number) else None
