"""Options that stand inside a text -> the text before them, and the options. Knows letters and numbers of exams.

    1．（6分）下列有关细胞的叙述，正确的是（　　）
    A．病毒是一类具有细胞结构的生物
    B．…

One text may hold several questions, each with its number and its own options (reading comprehension). Exams come from
printed pages: a page's number may stick to a letter (`16C．`), a full stop may be missing (`C respected`). Such looser
readings are tried only where the strict one finds too little.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from trainer.evaluate.items import LETTERS

_END = r"\s*[．.、：:](?![A-Z][.．])"
# A letter that ends a formula or a word (`RNA、`, `$A.`), or stands in an abbreviation (`D.C.`), starts no option.
_STRICT = re.compile(rf"(?<![A-Z][.．])(?<![A-Za-z0-9$\\{{_^/＋+-])([{LETTERS}]){_END}")
_PAGED = re.compile(rf"(?<![A-Z][.．])(?<![A-Za-z0-9$\\{{_^/＋+.-])\d{{0,2}}([{LETTERS}]){_END}")
_LOOSE = re.compile(rf"(?:^|(?<=[\s．.、)）]))([{LETTERS}])(?:{_END}|(?=\s)|(?=[A-Z][a-z]))")
_BRACKETED = re.compile(rf"(?<![A-Za-z0-9$\\{{_^])[（(]\s*([{LETTERS}])\s*[）)]")
_MARKS = (_STRICT, _PAGED, _BRACKETED, _LOOSE)
_USUAL = 4  # options
_TRIED = 400  # numbers before the first options; a cloze text is full of them
_NUMBER = re.compile(r"(?<!\d)[（(]?(\d{1,3})(?!\d)")
_WIDE = re.compile(r"[⺀-鿿豈-﫿＀-￯　-〿]")


@dataclass(frozen=True)
class Question:
    stem: str
    options: tuple[str, ...]


@dataclass
class _Run:
    """One question's options: where each begins with its letter, and where its text does."""

    starts: list[int]
    bodies: list[int]


def question_in(text: str) -> Question | None:
    """The longest run of options in a text, and what stands before it; None when there is no run A, B, …"""
    best: list[_Run] = []
    for mark in _MARKS:
        runs = _runs(text, mark)
        if _longest(runs) > _longest(best):
            best = runs
        if _longest(best) >= _USUAL:
            break
    if not best:
        return None
    run = [each for each in best if len(each.starts) == _longest(best)][-1]
    return Question(text[: run.starts[0]].strip(), _bodies(text, run, len(text)))


def questions_in(text: str, count: int) -> list[Question] | None:
    """`count` questions of one text, each with what they share before it; None when they cannot be told apart."""
    runs = [run for run in _runs(text, _STRICT) if len(run.starts) > 2]
    if len(runs) == 1 and len(runs[0].starts) > count:
        return _shared_options(text, runs[0], count)
    readings = [[run for run in _runs(text, mark) if len(run.starts) > 2] for mark in (_STRICT, _PAGED, _LOOSE)]
    fitting = [runs for runs in readings if len(runs) == count]
    even = [runs for runs in fitting if len({len(run.starts) for run in runs}) == 1]
    for runs in (*even, *fitting):
        begins = _begins(text, runs)
        if begins is not None:
            return [
                Question(
                    "\n".join(filter(None, (text[: begins[0]].strip(), text[begin : run.starts[0]].strip()))),
                    _bodies(text, run, end),
                )
                for run, begin, end in zip(runs, begins, [*begins[1:], len(text)], strict=True)
            ]
    return None


def without_letters(options: list[str]) -> list[str]:
    """Options without their own letters, where most have them: `"(A)猫"`, `"B. dog"`."""
    marks = [re.match(rf"\s*[（(]?\s*{letter}\s*[）)．.、：:]\s*", option) for letter, option in zip(LETTERS, options)]  # noqa: B905
    filled = sum(1 for option in options if option.strip())
    if filled < 2 or 2 * sum(1 for mark in marks if mark) <= filled:
        return options
    bare = [option[mark.end() :].strip() if mark else option for option, mark in zip(options, marks)]  # noqa: B905
    return bare + options[len(bare) :]


def joined_lines(text: str) -> str:
    """One line: line breaks of a printed page fall away between Chinese characters, else they become a space."""

    joined = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        apart = joined and not (_WIDE.match(joined[-1]) and _WIDE.match(line))
        joined += f" {line}" if apart else line
    return joined


def _runs(text: str, mark: re.Pattern[str]) -> list[_Run]:
    """Runs A, B, … of at least two letters. A letter out of its turn belongs to the text."""
    marks = [(match[1], match.start(), match.end()) for match in mark.finditer(text)]
    following = _following(marks)
    runs = [_Run([], [])]
    for (letter, start, end), after in zip(marks, following, strict=True):
        run = runs[-1]
        wanted = LETTERS[len(run.starts)] if len(run.starts) < len(LETTERS) else ""
        is_first = letter == "A" and not (len(run.starts) > 1 and after == wanted)  # else A stands in option B's text
        if is_first:
            runs.append(_Run([], []))
        elif letter != wanted:
            continue
        runs[-1].starts.append(start)
        runs[-1].bodies.append(end)
    return [run for run in runs if len(run.starts) > 1]


def _following(marks: list[tuple[str, int, int]]) -> list[str]:
    """For each mark the next letter that is no A."""
    found, letter = [], ""
    for each, _, _ in reversed(marks):
        found.append(letter)
        letter = each if each != "A" else letter
    return found[::-1]


def _longest(runs: list[_Run]) -> int:
    return max((len(run.starts) for run in runs), default=0)


def _bodies(text: str, run: _Run, end: int) -> tuple[str, ...]:
    ends = [*run.starts[1:], end]
    return tuple(joined_lines(text[start:stop]) for start, stop in zip(run.bodies, ends, strict=True))


def _begins(text: str, runs: list[_Run]) -> list[int] | None:
    """Where each question begins: at its number, each one more than the last."""
    for first in reversed(list(_NUMBER.finditer(text, 0, runs[0].starts[0]))[-_TRIED:]):
        begins = [first.start()]
        for step, (run, following) in enumerate(pairwise(runs), 1):
            begin = _number_at(text, int(first[1]) + step, run.bodies[-1], following.starts[0])
            if begin is None:
                break
            begins.append(begin)
        if len(begins) == len(runs):
            return begins
    return None


def _number_at(text: str, number: int, start: int, stop: int) -> int | None:
    """Best at the start of a line, then with a stop behind it, then anywhere."""
    plain = rf"(?<!\d)[（(]?{number}(?!\d)"
    for pattern in (rf"(?<=\n)[ \t　]*{plain}", rf"{plain}\s*[．.、)）]", plain):
        found = re.compile(pattern).search(text, start, stop)
        if found:
            return found.start()
    return None


def _shared_options(text: str, run: _Run, count: int) -> list[Question]:
    """Blanks that are filled from one list of options, more than there are blanks."""
    stem, options = text[: run.starts[0]].strip(), _bodies(text, run, len(text))
    numbers = {int(number) for number in re.findall(r"(?<!\d)\d{1,2}(?!\d)", stem)}
    first = next((n for n in sorted(numbers) if all(n + step in numbers for step in range(count))), None)
    names = [f"{first + step}." if first is not None else f"({step + 1}/{count})" for step in range(count)]
    return [Question(f"{stem}\n{name}", options) for name in names]
