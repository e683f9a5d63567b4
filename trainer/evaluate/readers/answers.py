"""Right answers as files write them -> indices of options. Knows letters, not questions."""

import re
import unicodedata
from typing import Any

from trainer.data.rows import RowRefused
from trainer.evaluate.items import LETTERS

_LEAD = re.compile(
    r"(?:THE)?(?:CORRECT|RIGHT|正确|标准|参考)?(?:ANSWERS?|OPTIONS?|答案|选项|应选|故选|选)?(?:IS|ARE|是|为|应为)?[:：]*"
)
_AROUND = re.compile(r"""[\s()\[\]{}<>《》【】〔〕"'“”‘’。.]+""")
_APART = r"[,，、;；/|&+和及与]"
_SEVERAL = re.compile(rf"[{LETTERS}](?:{_APART}*[{LETTERS}])*")


def letters_of(text: str) -> tuple[int, ...] | None:
    """`"B"`, `"acd"`, `"A、C"`, `"答案：（Ｂ）"` -> ascending indices; None when that is no answer of letters."""
    plain = _AROUND.sub("", unicodedata.normalize("NFKC", text)).upper()
    for candidate in (plain, _LEAD.sub("", plain, count=1)):
        candidate = candidate.rstrip(",;、")
        if _SEVERAL.fullmatch(candidate):
            return tuple(sorted({LETTERS.index(letter) for letter in candidate if letter in LETTERS}))
    return None


def is_clean(text: str, answers: tuple[int, ...]) -> bool:
    """Whether the file had exactly the letters, in order."""
    return text == "".join(LETTERS[index] for index in answers)


def answers_of(value: Any, options: list[str]) -> tuple[tuple[int, ...], str]:
    """Indices of the right options, and a note's code ("" where the file was clean). Raises RowRefused.

    `value` is letters, a list of letters, an index from 0 (whole numbers of JSON only), or the text of one option.
    """
    if isinstance(value, list):
        if not value or not all(isinstance(letter, str) for letter in value):
            raise RowRefused("bad-answer", "the answer is a list, but not of letters")
        value = "".join(value) if len(value) == 1 else ",".join(value)
        answers = letters_of(value)
        return _checked(answers, value), ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RowRefused("bad-answer", f"the answer is a {type(value).__name__}, letters are expected")
    if isinstance(value, int):
        if not 0 <= value < len(LETTERS):
            raise RowRefused("gold-outside", f"the answer is option number {value}")
        return (value,), "answer-is-index"
    answers = letters_of(value)
    same = [index for index, option in enumerate(options) if option and option == value.strip()]
    if len(same) == 1 and (answers is None or answers[-1] >= len(options)):
        return (same[0],), "answer-is-text"
    answers = _checked(answers, value)
    return answers, "" if is_clean(value, answers) else "answer-tidied"


def _checked(answers: tuple[int, ...] | None, value: str) -> tuple[int, ...]:
    if answers is not None:
        return answers
    if not value.strip(" \t\r\n,"):
        raise RowRefused("missing-answer", "the answer is empty")
    raise RowRefused("bad-answer", f"the answer has {len(value)} characters and is not letters of options")
