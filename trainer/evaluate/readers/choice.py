"""One record -> multiple-choice questions. Knows every way in which files write options; not which benchmark it is.

Options stand in columns A, B, …; under `options` as an object, a list, or lines; or inside the question's text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.rows import RowRefused
from trainer.data.turns import text_of
from trainer.evaluate.items import LETTERS
from trainer.evaluate.readers.answers import answers_of
from trainer.evaluate.readers.choice_keys import (
    ANSWER_KEYS,
    OPTION_KEYS,
    PASSAGE_KEYS,
    QUESTION_KEYS,
    TYPE_KEYS,
    letter_of_column,
)
from trainer.evaluate.readers.inline_options import Question, question_in, questions_in, without_letters

_LINES = re.compile(r"[\r\n]+|\t+")


@dataclass
class Choice:
    """A question before it has a name and a place."""

    question: str
    options: tuple[str, ...]
    answers: tuple[int, ...]
    is_multiple: bool = False
    notes: list[str] = field(default_factory=list)


def choices(record: Mapping[str, Any]) -> list[Choice | RowRefused]:
    """The questions of a record: one, or as many as its list of answers has. Raises RowRefused."""
    value = {key.strip().lower(): item for key, item in record.items() if isinstance(key, str)}
    stem = _stem(value)
    given = _options(value)
    answer = _answer(value)
    if given is None and isinstance(answer, list) and len(answer) > 1:
        return _several(stem, answer)
    if given is None:
        found = question_in(stem)
        if found is None:
            raise RowRefused("no-options", "neither columns nor a list nor the question's text holds options")
        given, stem = list(found.options), found.stem
    return [_choice(value, Question(stem, tuple(given)), answer)]


def has_options(record: Mapping[str, Any]) -> bool:
    """Whether the record names options by its keys."""
    value = {key.strip().lower(): item for key, item in record.items() if isinstance(key, str)}
    return _columns(value) is not None or any(value.get(key) for key in OPTION_KEYS)


def _several(text: str, answers: list[Any]) -> list[Choice | RowRefused]:
    questions = questions_in(text, len(answers))
    if questions is None:
        detail = f"{len(answers)} answers, and not as many runs of options in the text"
        return [RowRefused("options-unclear", detail) for _ in answers]
    found: list[Choice | RowRefused] = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            found.append(_choice({}, question, answer))
        except RowRefused as refusal:
            found.append(refusal)
    return found


def _choice(value: Mapping[str, Any], asked: Question, answer: Any) -> Choice:
    if not asked.stem.strip():
        raise RowRefused("missing-question", "the question is empty")
    options = without_letters([text_of(option, "an option").strip() for option in asked.options])
    notes = []
    filled = _without_unused(options)
    if len(filled) < len(options):
        notes.append("unused-option-dropped")
    if answer is None or answer in ("", []):
        raise RowRefused("missing-answer", "there is no answer")
    answers, note = answers_of(text_of(answer, "the answer") if isinstance(answer, str) else answer, options)
    _check(options, filled, answers)
    if len(set(filled)) < len(filled):
        notes.append("equal-wrong-options")
    is_multiple = _is_multiple(value, answer, answers, notes)
    return Choice(asked.stem.strip(), tuple(filled), answers, is_multiple, notes + ([note] if note else []))


def _check(options: list[str], filled: list[str], answers: tuple[int, ...]) -> None:
    if len(filled) < 2:
        raise RowRefused("no-options", f"{len(filled)} options are not empty")
    if len(filled) > len(LETTERS):
        raise RowRefused("too-many-options", f"{len(filled)} options, {len(LETTERS)} at most can be asked")
    for index in answers:
        if index >= len(options):
            raise RowRefused("gold-outside", f"the answer is {LETTERS[index]}, there are {len(options)} options")
        if not options[index]:
            raise RowRefused("empty-gold", f"the answer is {LETTERS[index]}, and that option is empty")
    if not all(filled):
        raise RowRefused("empty-option", f"option {LETTERS[filled.index('')]} is empty, and others follow it")
    right = {options[index] for index in answers}
    if sum(option in right for option in filled) > len(answers):
        raise RowRefused("duplicate-option", "a right option stands there twice")


def _without_unused(options: list[str]) -> list[str]:
    end = len(options)
    while end and not options[end - 1]:
        end -= 1
    return options[:end]


def _is_multiple(value: Mapping[str, Any], answer: Any, answers: tuple[int, ...], notes: list[str]) -> bool:
    kind = next((str(value[key]).lower() for key in TYPE_KEYS if value.get(key)), "")
    if "multi" in kind or "多" in kind or "不定项" in kind:
        if len(answers) == 1:
            notes.append("multiple-with-one-answer")
        return True
    if ("single" in kind or "单" in kind) and len(answers) > 1:
        notes.append("single-with-several-answers")
    return len(answers) > 1 or ("label" in value and isinstance(answer, list))


def _stem(value: Mapping[str, Any]) -> str:
    key = next((key for key in QUESTION_KEYS if value.get(key)), None)
    parts = [text_of(value[name], name) for name in ("instruction", *PASSAGE_KEYS) if value.get(name)]
    if key is None and not parts:
        raise RowRefused("missing-question", "there is no question")
    return "\n".join([*parts, *([text_of(value[key], key)] if key else [])])


def _answer(value: Mapping[str, Any]) -> Any:
    """The first that says anything."""
    return next((value[key] for key in ANSWER_KEYS if value.get(key) not in (None, "", [])), None)


def _columns(value: Mapping[str, Any]) -> list[Any] | None:
    columns = {letter_of_column(key): item for key, item in value.items()}
    columns.pop(None, None)
    if len(columns) < 2:
        return None
    last = max(index for index in columns if index is not None)
    return ["" if columns.get(index) is None else columns[index] for index in range(last + 1)]


def _options(value: Mapping[str, Any]) -> list[str] | None:
    """None where the record has none of its own."""
    given = next((value[key] for key in OPTION_KEYS if value.get(key)), None)
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        given = given["text"]  # {"text": […], "label": ["A", …]}
    if isinstance(given, dict):
        given = _columns({str(key).lower(): item for key, item in given.items()})
    elif isinstance(given, str):
        given = _option_lines(text_of(given, "the options"))
    elif isinstance(given, list):
        given = [_option_text(option) for option in given]
    elif given is None:
        given = _columns(value)
    return None if given is None else ["" if option is None else _plain(option) for option in given]


def _option_text(option: Any) -> Any:
    """Of a string, or of {"key": "A", "value": "…"}."""
    if not isinstance(option, dict):
        return option
    return next((option[key] for key in ("text", "value", "content") if key in option), None)


def _option_lines(text: str) -> list[str] | None:
    found = question_in(text)
    if found is not None and not found.stem:
        return list(found.options)
    lines = [line.strip() for line in _LINES.split(text) if line.strip()]
    return lines if len(lines) > 1 else None


def _plain(option: Any) -> str:
    """Numbers are options, too."""
    if isinstance(option, float):
        return f"{option:g}"
    return text_of(str(option) if isinstance(option, int) else option, "an option").strip()
