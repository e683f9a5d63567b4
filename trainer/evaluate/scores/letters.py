"""Which option a written answer chooses: its letters, or the text of one option. None where it is not plain.

A guess would count as a choice, and a model that never chooses would score as chance does; so an answer that names
two conclusions, or a letter only in passing, has none.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

from trainer.evaluate.items import LETTERS

_CJK: Final = r"\u3400-\u9fff"
_LETTER: Final = r"[\"'“‘(\[【<]?[A-J][\"'”’)\]】>]?"
# Behind letters: A选项, A、B两项, AC三个选项.
_THESE: Final = r"(?:[二两三四五六七八九十]?个?选?项|[二两三四五六七八九十][个者])"
_FALSE: Final = r"(?:不|错|(?i:not|wrong|incorrect|isn't|aren't)\b)"
# Letters that belong together: ABD; A、C; A, B and D; "A"和"C". A new clause does not: ABD，C选项错误.
_COMMA: Final = rf",(?!\s*{_LETTER}\s*(?:选项|项)?\s*(?:是|(?i:is))?\s*{_FALSE})"
_JOIN: Final = rf"[ \t]*(?:{_COMMA}|、|;|/|&|\+|和|及|与|跟|以及|,?[ \t]*(?i:\band\b))?[ \t]*"
# What may follow, so that the letter is no part of a word or a name: not "B超", "C-reactive", "A patient", "B.C.".
_END: Final = (
    r"(?![A-Za-z0-9'’]|-\w|\.[A-Z]\.)"
    rf"(?!(?!{_THESE}|正确|是|为|才|最|吧|还|或|不|错|吗|都|均)[{_CJK}])"
    r"(?!\s+(?!(?i:because|since|as|which|and|or|is|are|due|for|isn't|aren't|not|but)\b)[a-z])"
)
_GROUP: Final = rf"(?<![A-Za-z0-9])(?P<group>{_LETTER}(?:{_JOIN}{_LETTER})*){_END}"
_NOUN: Final = r"(?i:选项|option\s+|choice\s+)?\s*"
_RIGHT: Final = r"(?:答案|正确的?(?:选项|一项)?|(?:最佳|合适)的?选项)(?:的?字母)?"
_MUST: Final = r"(?:应该|应当|应|就|本题|此题|该题)*"

# "故选" and "答案是" conclude; "我选" may be part of a train of thought and counts only where nothing concludes.
_CONCLUSION: Final = (
    rf"{_RIGHT}{_MUST}(?:选择|选|分别是|分别为|是|为|有|包括|包含|:)\s*:?\s*{_NOUN}{_GROUP}",
    rf"答案[】\])]?\s*:?\s*{_GROUP}",
    rf"(?:故|因此|所以|综上所述|综上)[,:]?\s*{_MUST}(?:选择|选)\s*:?\s*{_NOUN}{_GROUP}",
    rf"(?i:故|因此|所以|综上|therefore|thus|hence|so)[,:]?\s*{_NOUN}{_GROUP}\s*[.。!]?\s*$",
    rf"(?i:\b(?:answers?|(?:correct|right|best)\s+(?:options?|choices?))\s+(?:is|are|(?:would|should|must)\s+be)\s*:?\s*){_NOUN}{_GROUP}",
    rf"(?i:\banswers?\s*:\s*){_NOUN}{_GROUP}",
)
_CHOICE: Final = (
    rf"(?:选择|选)\s*:?\s*{_NOUN}{_GROUP}",
    rf"(?i:\b(?:i|we)(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with|go\s+for)\s+){_NOUN}{_GROUP}",
    rf"{_NOUN}{_GROUP}\s*{_THESE}?\s*(?:[都均]?[是为]?正确|是对的|(?i:(?:is|are)\s+(?:the\s+)?(?:correct|right|best)\b))",
)
_WHOLE: Final = re.compile(rf"(?i:选项|选择|选|option\s|choice\s)?\s*{_GROUP}\s*{_THESE}?")
_LEADING: Final = re.compile(
    rf"(?:[(\[【](?P<inside>[A-J])[)\]】]|(?P<letter>[A-J])(?:\)|[.、,](?!\s*[A-J](?![a-z]))|:(?=\s*[{_CJK}])|\s*(?:选项|项)))"
)
_OR: Final = re.compile(r"\s*(?:还是|或者|或|(?i:or)\b)\s*[\"'“(]?[A-J](?![A-Za-z])")
_NOT: Final = re.compile(
    r"(?:(?:不|别|没|非)(?:是|要|能|应|应该|会|该|可以)?|(?i:\bnot|n't|n t|\bnever)(?:\s+an?|\s+the)?)\s*$"
)
_DENIED: Final = re.compile(rf"\s*{_THESE}?\s*[都均]?(?:是|(?i:is|are))?\s*(?:{_FALSE}|吗|\?)")
_WRAPPING: Final = re.compile(r"\*\*|__|`|\\boxed\{|\\text\{|\\mathrm\{|\}|\$")
_MARKS: Final = re.compile(r"(?:(?![.\-]\d)[\W_]|(?<!\d)\.)+")
_SPACE_BY_CJK: Final = re.compile(rf"(?<=[{_CJK}]) | (?=[{_CJK}])")


def letters_in(answer: str, num_options: int, options: Sequence[str] = ()) -> str | None:
    """The chosen letters, ascending ("B", "ACD"), of an answer to a question with `num_options` options (1 to 10).

    In this order: the whole answer (or its first line) is letters; one conclusion ("答案是B", "故选AC", "The answer
    is B."); one choice ("我选B", "B is correct"); one letter that leads the answer ("B. …", "(B) …"). With `options`,
    at last the one option whose text the answer repeats. Two different findings of the same kind, a letter that no
    option has, and a letter in passing ("A patient has …") are None.
    """
    text = _WRAPPING.sub("", unicodedata.normalize("NFKC", answer)).strip()
    for find in (_whole, _concluded, _chosen, _leading):
        found = find(text)
        if found:
            return _legal(found, num_options)
    index = option_in(answer, options)
    return None if index is None else LETTERS[index]


def option_in(answer: str, options: Sequence[str]) -> int | None:
    """Index of the one option whose text the answer is or repeats; None for none, several, or where it says "not".

    White space, marks, case and width do not count. An option that is part of a longer one counts only where it
    stands outside of it; a word or a number must stand alone (5 is not in 15 or 5.5).
    """
    text, bare = _bare(answer), [_bare(option) for option in options]
    same = [index for index, option in enumerate(bare) if option and option == text]
    if same:
        return same[0] if len(same) == 1 else None
    found = []
    for index in sorted(range(len(bare)), key=lambda index: -len(bare[index])):
        if len(bare[index]) < 2 and not bare[index].isdigit():
            continue  # a single character is in too many sentences
        alone = re.compile(rf"(?<![a-z0-9.\-]){re.escape(bare[index])}(?![a-z0-9]|\.\d)")
        if any(_NOT.search(text[: place.start()]) for place in alone.finditer(text)):
            return None
        text, count = alone.subn("\0", text)
        found += [index] * (count > 0)
    return found[0] if len(found) == 1 else None


def _whole(text: str) -> set[str]:
    """Letters and nothing else, in the whole answer or its first line; here small letters will do."""
    first, *others = [line for line in text.splitlines() if line.strip()] or [""]
    letters = _letters_only(first)
    if not letters:
        return set()
    return {letters} | set(filter(None, map(_letters_only, others))) | (_concluded(text) if others else set())


def _letters_only(line: str) -> str:
    """The letters of a line that is nothing else, ascending; "BAD" is a word, "CA" and "C、A" are none."""
    line = line.strip(" .。,:;!")
    found = _WHOLE.fullmatch(line.upper() if len(line) < 40 else line)
    letters = _letters(found["group"]) if found else ""
    ordered = "".join(sorted(set(letters)))
    is_word = letters != ordered and letters in line.upper() and (len(letters) > 2 or letters not in line)
    return "" if is_word or len(ordered) < len(letters) else ordered


def _concluded(text: str) -> set[str]:
    return _said(_CONCLUSION, text)


def _chosen(text: str) -> set[str]:
    return _said(_CHOICE, text)


def _leading(text: str) -> set[str]:
    """The letter that starts the answer, unless others start lines, too, or follow it: then it lists the options."""
    starts = {letter for line in text.splitlines() for letter in _starts(line.strip())}
    return starts if _LEADING.match(text) else set()


def _starts(line: str) -> list[str]:
    """The letter that starts a line, and those that follow in the same form: `A. 甲 C. 丙`."""
    found = _LEADING.match(line)
    if found is None:
        return []
    letter = found["letter"] or found["inside"]
    if found[0][-1] == "项":
        return [letter]  # "B选项最好，A选项片面" chooses
    form = re.escape(found[0]).replace(letter, "([A-J])")
    return [letter, *re.findall(rf"[\s,;、。]{form}\s*(?=[{_CJK}\d])", line)]


def _said(patterns: Sequence[str], text: str) -> set[str]:
    """Every set of letters that a pattern finds, less what is denied; "A or B" gives "", too, which is no choice."""
    said: set[str] = set()
    for pattern in patterns:
        for found in re.finditer(pattern, text, re.MULTILINE):
            if _NOT.search(text[: found.start()]) or _DENIED.match(text, found.end()):
                continue
            said.add("".join(sorted(_letters(found["group"]))))
            said |= {""} if _OR.match(text, found.end()) else set()
    return said


def _letters(group: str) -> str:
    return "".join(re.findall(r"[A-J]", re.sub(r"(?i)\band\b", "", group)))


def _legal(found: set[str], num_options: int) -> str | None:
    if len(found) != 1:
        return None
    (letters,) = found
    is_legal = bool(letters) and len(set(letters)) == len(letters) and set(letters) <= set(LETTERS[:num_options])
    return letters if is_legal else None


def _bare(text: str) -> str:
    """Words and numbers with one space between them, none beside Chinese."""
    return _SPACE_BY_CJK.sub("", _MARKS.sub(" ", unicodedata.normalize("NFKC", text)).strip()).casefold()
