"""The names that files of multiple-choice questions give to their columns and keys."""

import re

from trainer.evaluate.items import LETTERS

QUESTION_KEYS = ("question", "题目", "问题", "题干", "试题", "stem", "question_stem", "query", "input")
OPTION_KEYS = ("options", "choices", "选项", "option", "candidates", "备选项")
# In the order in which they are looked at: letters first, where a file has both letter and text.
ANSWER_KEYS = (
    "label", "answer_idx", "answerkey", "answer_key", "gold", "answer", "答案", "正确答案", "标准答案", "correct",
    "target", "output",
)  # fmt: skip
PASSAGE_KEYS = ("passage", "context", "材料")
SUBJECT_KEYS = ("subject_name", "subject", "类别", "学科", "科目")
TYPE_KEYS = ("question_type", "题型", "类型")
_COLUMN = re.compile(rf"(?:选项|option|opt|choice)?[ _-]?([{LETTERS}])(?:选项|项)?", re.IGNORECASE)


def letter_of_column(name: str) -> int | None:
    """`A`, `选项A`, `option_a`, `opa` -> 0; None for another column."""
    match = _COLUMN.fullmatch(name.strip())
    if match:
        return LETTERS.index(match[1].upper())
    return {"opa": 0, "opb": 1, "opc": 2, "opd": 3, "ope": 4}.get(name.strip().lower())
