"""Multiple-choice questions as prompts: zero- or few-shot, as a chat or as plain text, options in their own order or
shuffled; and what all plain prompts share. Knows neither candidates nor scores.

The wording is each benchmark's own: MMLU (Hendrycks et al. 2021, github.com/hendrycks/test), C-Eval (Huang et al. 2023,
github.com/hkust-nlp/ceval), CMMLU (Li et al. 2023, github.com/haonan-li/CMMLU), as lm-evaluation-harness writes it.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.evaluate.candidate import Message, Prompt
from trainer.evaluate.items import LETTERS, ChoiceItem, TextItem

Asked = TypeVar("Asked", ChoiceItem, TextItem)
_HAN = re.compile("[\u3400-\u9fff]")
_NO_SPACE = re.compile(r"[\s\u3000-\u303f\u3400-\u9fff\uff00-\uff60]")  # Chinese writing with its marks
_ZH_HEADS = {
    "ceval": "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。",
    "cmmlu": "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。",
}
_ZH_HEAD = "以下是关于{subject}的单项选择题，请选出其中的正确答案。"
_ZH_MULTIPLE = "以下是关于{subject}的多项选择题，请选出其中所有的正确答案。"
_EN_HEAD = "The following are multiple choice questions (with answers) about {subject}."
_EN_MULTIPLE = "The following are multiple choice questions (with all right answers) about {subject}."
# Only where the answer is written: a letter whose probability is read needs no request.
_ZH_ASK = {False: "请直接回答正确选项的字母。", True: "请直接回答所有正确选项的字母。"}
_EN_ASK = {
    False: "Answer with the letter of the right option only.",
    True: "Answer with the letters of all right options only.",
}


@dataclass(frozen=True)
class Style:
    """`shots` examples before each question. `is_plain`: one text, for base models; else a chat whose examples are
    turns. `is_written`: the answer will be generated."""

    shots: int = 0
    is_plain: bool = False
    is_written: bool = False
    system: str = ""


@dataclass(frozen=True)
class Shown:
    """A question as it is asked: `order[i]` is the item's option that stands at place i. `is_chinese`: what is said
    around it."""

    item: ChoiceItem
    order: tuple[int, ...]
    is_chinese: bool

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self.item.options[index] for index in self.order)

    @property
    def answers(self) -> str:
        """The right letters as shown, ascending."""
        return "".join(letter for letter, index in zip(LETTERS, self.order, strict=False) if index in self.item.answers)


def shown(item: ChoiceItem, shuffle_seed: int | None = None, *, is_chinese: bool | None = None) -> Shown:
    """Options in their own order, or in one that the seed and the item's id decide. Without `is_chinese` the item's
    own language decides."""
    order = list(range(len(item.options)))
    if shuffle_seed is not None:
        digest = hashlib.sha256(f"{shuffle_seed}\0{item.item_id}".encode()).digest()
        random.Random(digest).shuffle(order)
    return Shown(item, tuple(order), bool(chinese_subjects([item])) if is_chinese is None else is_chinese)


def chinese_subjects(items: Sequence[ChoiceItem]) -> set[tuple[str, str]]:
    """Benchmark and subject of those that are asked in Chinese: one Chinese character in the subject's name or in any
    of its questions will do, as a formula has no language, and one subject's prompts must begin alike."""
    return {
        (item.benchmark, item.subject)
        for item in items
        if item.benchmark != "mmlu" and _HAN.search("".join([item.subject, item.question, *item.options]))
    }


def by_subject(items: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Examples by subject, in reading order."""
    examples: dict[str, list[Asked]] = {}
    for item in items:
        if item.is_example:
            examples.setdefault(item.subject, []).append(item)
    return examples


def choice_prompt(question: Shown, examples: Sequence[ChoiceItem], style: Style) -> Prompt:
    """What is asked for one question; its options' letters follow it."""
    item = question.item
    alike = [example for example in examples if example.is_multiple == item.is_multiple] or list(examples)
    solved = [shown(example, is_chinese=question.is_chinese) for example in alike[: style.shots]]
    head = _head(question, style)
    group = f"{item.benchmark}/{item.subject}/{item.is_multiple}" if solved else ""
    if style.is_plain:
        blocks = [answered(_body(each), each.answers) for each in solved]
        return Prompt(text="\n\n".join([head, *blocks, _body(question)]), group=group)
    turns: list[Message] = [{"role": "system", "content": style.system}] if style.system else []
    for each in solved:
        turns += [{"role": "user", "content": _body(each)}, {"role": "assistant", "content": each.answers}]
    turns.append({"role": "user", "content": _body(question)})
    first = 1 if style.system else 0
    turns[first] = {"role": "user", "content": f"{head}\n\n{turns[first]['content']}"}
    return Prompt(messages=tuple(turns), group=group)


def continuations(question: Shown, style: Style) -> list[str]:
    """What the answer may begin with: a letter for each option."""
    letters = LETTERS[: len(question.order)]
    return [delimiter(_body(question), letter) + letter if style.is_plain else letter for letter in letters]


def delimiter(question: str, answer: str) -> str:
    """Between the two in plain text: a space, but none beside Chinese (`答案：B`, `A:是`) or where there is one."""
    return "" if _NO_SPACE.match(question[-1:]) or _NO_SPACE.match(answer) else " "


def answered(question: str, answer: str) -> str:
    """A solved example in plain text."""
    return question + delimiter(question, answer) + answer


def _head(question: Shown, style: Style) -> str:
    item = question.item
    if question.is_chinese:
        text = _ZH_MULTIPLE if item.is_multiple else _ZH_HEADS.get(item.benchmark, _ZH_HEAD)
        ask = _ZH_ASK[item.is_multiple]
    else:
        text = _EN_MULTIPLE if item.is_multiple else _EN_HEAD
        ask = " " + _EN_ASK[item.is_multiple]
    subject = item.subject.replace("_", " ")
    return text.format(subject=subject) + (ask if style.is_written and not style.is_plain else "")


def _body(question: Shown) -> str:
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    ask = "答案：" if question.is_chinese else "Answer:"
    return "\n".join([question.item.question.strip(), *options, ask])
