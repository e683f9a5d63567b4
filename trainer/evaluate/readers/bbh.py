"""BIG-Bench Hard (Suzgun et al. 2022, arXiv 2210.09261): `<task>.json`, and `cot-prompts/<task>.txt` beside it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.files import open_text
from trainer.data.rows import RowRefused
from trainer.data.turns import text_of
from trainer.evaluate.readers.text import Asked

TASKS = frozenset((
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
))  # fmt: skip
_RULE = re.compile(r"\n-{3,}[ \t]*\n")
_ASKED = re.compile(r"(?m)^Q:[ \t]*")
_LONGEST_PROMPTS = 1 << 20  # characters


def is_bbh(path: Path, record: Mapping[str, Any]) -> bool:
    return set(record) == {"input", "target"} and (path.stem in TASKS or "bbh" in {part.lower() for part in path.parts})


def task_item(record: Any) -> Asked:
    """Raises RowRefused."""
    if not isinstance(record, dict) or "input" not in record or "target" not in record:
        raise RowRefused("wrong-shape", "an example has input and target")
    question, answer = text_of(record["input"], "input"), text_of(record["target"], "target")
    if not question.strip():
        raise RowRefused("missing-question", "input is empty")
    if not answer.strip():
        raise RowRefused("missing-answer", "target is empty")
    return Asked(({"role": "user", "content": question.strip()},), (answer.strip(),))


def prompt_path(path: Path) -> Path | None:
    """The file of worked examples of a task's file."""
    folders = (path.parent, path.parent / "cot-prompts", path.parent.parent / "cot-prompts")
    found = (folder / f"{path.stem}.txt" for folder in folders)
    return next((each for each in found if each.is_file()), None)


def prompt_examples(path: Path) -> list[Asked | RowRefused]:
    """Worked examples: what the task is (as a system turn), question, and the whole reasoned answer."""
    with open_text(path) as stream:
        text = stream.read(_LONGEST_PROMPTS).replace("\r\n", "\n")
    task, *parts = _ASKED.split(_RULE.split(text, maxsplit=1)[-1])
    return [_or_refusal(task.strip(), part) for part in parts]


def _or_refusal(task: str, part: str) -> Asked | RowRefused:
    question, _, answer = (text.strip() for text in part.partition("\nA:"))
    try:
        if not question or not answer:
            raise RowRefused("missing-answer" if question else "missing-question", "of a worked example")
        system = [{"role": "system", "content": text_of(task, "the task")}] if task else []
        asked = {"role": "user", "content": text_of(question, "the question")}
        return Asked((*system, asked), (text_of(answer, "the answer"),))
    except RowRefused as refusal:
        return refusal
