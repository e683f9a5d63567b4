"""Short answers compared as they are, as BBH's are scored (Suzgun et al. 2022, arXiv 2210.09261)."""

import re
import unicodedata
from typing import Final

_MARKER: Final = re.compile(
    r"(?:\b(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)|(?:最终|正确)?答案(?:应该|应)?(?:是|为|:))\s*:?",
    re.IGNORECASE,
)
_BOXED: Final = re.compile(r"\\boxed\{([^{}]*)\}")
# A base model that was shown examples goes on with the next one.
_NEXT_QUESTION: Final = re.compile(r"\n\s*(?:Q|Question|问题|题目)\s*:", re.IGNORECASE)
_OPTION: Final = re.compile(r"\(([A-Z])\)")
_BARE_OPTION: Final = re.compile(r"([A-Za-z])(?:[.):]|$)")
_THOUSANDS: Final = re.compile(r"(?<=\d),(?=\d{3}\b)")
_WRAPPING: Final = ("**", "*", "`", '"', "'", "“", "”", "$")


def final_answer(answer: str) -> str:
    """What an answer says in the end: what follows its last "the answer is" (or 答案是, or stands in \\boxed{}), up
    to the end of that line; without one, its last line. What a model writes after a new "Q:" is not read."""
    text = unicodedata.normalize("NFKC", answer)
    text = _NEXT_QUESTION.split("\n" + text.strip(), maxsplit=1)[0].strip()
    boxed = _BOXED.findall(text)
    if boxed:
        return str(boxed[-1]).strip()
    markers = list(_MARKER.finditer(text))
    if markers and (rest := text[markers[-1].end() :].strip()):
        return rest.splitlines()[0].strip()
    return text.splitlines()[-1].strip() if text else ""


def normalized(text: str) -> str:
    """Width and case of letters, white space, wrapping marks, a closing full stop and commas in thousands do not
    count. A text that is nothing but marks stays as it is."""
    whole = text = " ".join(unicodedata.normalize("NFKC", text).split())
    previous = None
    while text != previous:
        previous = text
        text = text.rstrip(".。!;,， ").strip()
        for mark in _WRAPPING:
            text = text.removeprefix(mark).removesuffix(mark).strip()
    return _THOUSANDS.sub("", text).casefold() or whole


def exact_match(answer: str, reference: str) -> float:
    """1.0 where the final answer is the reference, else 0.0.

    A reference such as "(B)" asks for the letter: "(B)", "B", "B." and "(B) 04/13/2001" have it; two different
    letters in parentheses have none, unless the final answer starts with one. Raises ValueError for an empty
    reference.
    """
    expected = normalized(reference)
    if not expected:
        raise ValueError("an exact match needs a reference")
    found = final_answer(answer)
    option = _OPTION.fullmatch(unicodedata.normalize("NFKC", reference).strip())
    if option:
        return float(_option_of(found) == option[1])
    return float(normalized(found) == expected)


def _option_of(found: str) -> str | None:
    bare = found.strip("*`\"' $")
    start = _OPTION.match(bare)
    if start:
        return start[1]
    only = set(_OPTION.findall(bare))
    if only:
        return only.pop() if len(only) == 1 else None
    letter = _BARE_OPTION.match(bare)
    return letter[1].upper() if letter else None
