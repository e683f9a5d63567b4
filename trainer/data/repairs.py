"""Repairs of a row's texts that change no meaning, each with a name. Knows one text at a time."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.rows import Row

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|ldquo|rdquo|lsquo|rsquo|hellip|mdash|middot|#\d{1,6}|#x[0-9a-f]{1,5});", re.I
)
# C0 controls but tab and line ends, byte order marks, direction marks. Joiners are kept: emoji need them. C1 stay
# too: they are not noise but the trace of a wrong encoding, by which the mojibake rule knows it.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
_IS_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")
_FULL_WIDTH = {
    code: code - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for code in range(ord(first), ord(last) + 1)
}


@dataclass(frozen=True)
class Repair:
    name: str
    text: str
    apply: Callable[[str], str]


def _controls(text: str) -> str:
    return _CONTROL.sub("", text)


def _entities(text: str) -> str:
    if "&" not in text:
        return text
    parts = _CODE.split(text)  # odd parts are code, where an entity may be meant
    parts[::2] = [_ENTITY.sub(lambda found: html.unescape(found[0]), part) for part in parts[::2]]
    return "".join(parts)


def _full_width(text: str) -> str:
    return text.translate(_FULL_WIDTH) if _IS_FULL_WIDTH.search(text) else text


def _white_space(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").replace("\u3000", " ")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# In this order: an entity may stand for a space, a control character may hide one.
REPAIRS: tuple[Repair, ...] = (
    Repair("html-entity", "&nbsp; &lt; &#39; and the like become the characters they name, outside of code", _entities),
    Repair("control-character", "invisible control characters go", _controls),
    Repair("full-width", "full-width letters and digits become plain ones; punctuation stays", _full_width),
    Repair("white-space", "ends trimmed, one kind of space and line end, at most one blank line", _white_space),
)


def repaired(row: Row, repairs: Sequence[Repair] = REPAIRS) -> tuple[Row, tuple[str, ...]]:
    """The row with its texts repaired, and the names of the repairs that changed something."""
    changed: dict[str, None] = {}

    def fix(text: str) -> str:
        for repair in repairs:
            better = repair.apply(text)
            if better != text:
                changed[repair.name] = None
            text = better
        return text

    def turn(message: dict[str, Any]) -> dict[str, Any]:
        return {**message, "content": fix(str(message["content"]))}

    better = replace(
        row,
        messages=tuple(map(turn, row.messages)),
        text=fix(row.text),
        chosen=fix(row.chosen),
        rejected=fix(row.rejected),
    )
    return (better, tuple(changed)) if changed else (row, ())
