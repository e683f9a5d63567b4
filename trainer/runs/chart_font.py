"""A font for plots that has every character of their words. Knows matplotlib's font list; draws nothing."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

INSTALL_HINT = "install one, for example `apt install fonts-noto-cjk`, and run this again"
# Sans-serif faces of the usual systems, simplified Chinese first; then whatever sounds like one.
_PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Noto Sans CJK JP",
    "Droid Sans Fallback",
)
_SOUNDS_CJK = ("cjk", "hei", "han sans", "song", "kai", "ming", "gothic", "fallback", "unicode")
_DEFAULT = "DejaVu Sans"  # ships with matplotlib


def font_for(words: Iterable[str]) -> str | None:
    """The name of a font that can draw all of `words`; None when this machine has none."""
    needed = {ord(character) for word in words for character in word if not character.isspace()}
    entries = font_manager.fontManager.ttflist
    for entry in sorted(entries, key=_rank):
        if _rank(entry)[0] < len(_PREFERRED) + 2 and _has(Path(entry.fname), entry.index, needed):
            return entry.name
    return None


def _rank(entry: font_manager.FontEntry) -> tuple[int, bool, int, str]:
    """matplotlib's own font first, then ours in order, then likely ones; upright and regular before others."""
    name = entry.name
    if name == _DEFAULT:
        place = 0
    elif name in _PREFERRED:
        place = 1 + _PREFERRED.index(name)
    else:
        is_likely = any(sound in name.lower() for sound in _SOUNDS_CJK)
        place = len(_PREFERRED) + (1 if is_likely else 2)
    return place, entry.style != "normal", abs(int(entry.weight) - 400) if str(entry.weight).isdigit() else 0, name


def _has(file: Path, index: int, needed: set[int]) -> bool:
    try:
        return needed <= FT2Font(file, face_index=index).get_charmap().keys()
    except (OSError, RuntimeError):
        return False  # listed in matplotlib's cache, but gone or broken
