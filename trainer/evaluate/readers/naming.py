"""What a benchmark, its subjects and its splits are called: told from paths and from the records' shape."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORDS = {
    "cmmlu": "cmmlu", "ceval": "ceval", "c-eval": "ceval", "c_eval": "ceval", "mmcu": "mmcu", "mmlu": "mmlu",
    "agieval": "agieval", "gaokao": "gaokao", "cpsyexam": "cpsyexam",
}  # fmt: skip
_WORD = re.compile(f"(?:{'|'.join(map(re.escape, _WORDS))})(?![-_ ]?(?:pro|redux|plus|lite))")
_DEV = ("dev", "train", "auxiliary_train")
_SPLITS = (*_DEV, "val", "valid", "validation", "test")
_SPLIT_END = re.compile(rf"[_\-.](?:{'|'.join(_SPLITS)})$", re.IGNORECASE)
_GENERIC = frozenset((*_SPLITS, "data", "questions", "questions_gen_sqlite", "examples", "eval", "index"))
_MMCU_SUBJECTS = ("医疗", "法律", "心理", "教育")
_AGIEVAL = frozenset(("passage", "label", "options", "question"))


def choice_benchmark(path: Path, record: Mapping[str, Any], form: str) -> str:
    """The record's shape decides where only one benchmark has it; then the path's words; then the file's name."""
    keys = {str(key).strip().lower() for key in record}
    if keys >= _AGIEVAL:
        return "agieval"
    if keys >= {"subject_name", "question_type", "options"}:
        return "cpsyexam"
    if keys >= {"year", "category", "answer", "index"}:
        return "gaokao"
    if keys >= {"类别", "题目", "选项", "答案"}:
        return "mmcu"
    word = _WORD.search("/".join(path.parts[-4:]).lower())
    if word:
        return _WORDS[word[0]]
    if form == "rows":
        return "mmlu"
    if keys >= {"id", "question", "a", "b", "c", "d"} and form != "sheet":
        return "ceval"
    if keys == {"", "question", "a", "b", "c", "d", "answer"}:
        return "cmmlu"
    if form == "sheet" and path.stem.startswith(_MMCU_SUBJECTS):
        return "mmcu"
    return set_name(path)


def set_name(path: Path) -> str:
    """The file's own name, or its folder's where the file is called after a split."""
    stem = _SPLIT_END.sub("", path.stem)
    if stem.lower() in _GENERIC:
        folder = next((part for part in reversed(path.resolve().parts[:-1]) if part.lower() not in _GENERIC), stem)
        return re.sub(r"\s+", "_", folder)
    return re.sub(r"\s+", "_", stem)


def subject_name(path: Path) -> str:
    return _SPLIT_END.sub("", path.stem)


def is_dev(path: Path) -> bool:
    """Whether the file is of a split that is shown and not scored: by its name's end, else by its nearest folder."""
    end = _SPLIT_END.search(path.stem)
    if end:
        return end[0][1:].lower() in _DEV
    return next((part.lower() in _DEV for part in reversed(path.parts[-3:-1]) if part.lower() in _SPLITS), False)
