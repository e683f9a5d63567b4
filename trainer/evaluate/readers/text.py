"""One record -> questions with reference answers. Rows are recognised as training rows are (trainer.data.shapes)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.order import finished
from trainer.data.rows import Message, RowRefused
from trainer.data.shapes import drafts
from trainer.data.turns import text_of

PAIRS = "QA_pairs"  # CMB: several questions about one case
_REFERENCES = ("references", "answers")


@dataclass
class Asked:
    """What is asked and what is right, before it has a name and a place."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]


def asked(record: Any) -> list[Asked | RowRefused]:
    """The questions of a record. Of a conversation the last turn is asked. Raises RowRefused."""
    if isinstance(record, dict) and isinstance(record.get(PAIRS), list):
        return [_or_refusal(_pair, record, pair) for pair in record[PAIRS]]
    references = _references(record)
    if references:
        record = {**{key: item for key, item in record.items() if key not in _REFERENCES}, "answer": references[0]}
    return [
        draft if isinstance(draft, RowRefused) else _or_refusal(_last_turn, draft, references)
        for draft in drafts(record)
    ]


def exact(record: Mapping[str, Any]) -> Asked:
    """A question with a short answer and no options (AGIEval's mathematics). Raises RowRefused."""
    parts = [text_of(record[key], key) for key in ("passage", "question") if record.get(key)]
    given = (record.get(key) for key in ("answer", "label"))
    answer = next((value for value in given if value not in (None, "", [])), "")
    if not any(part.strip() for part in parts):
        raise RowRefused("missing-question", "there is no question")
    text = str(answer) if isinstance(answer, int | float) else text_of(answer, "answer").strip()
    if not text:
        raise RowRefused("missing-answer", "there is no answer")
    return Asked(({"role": "user", "content": "\n".join(parts)},), (text,))


def _or_refusal(read: Any, *arguments: Any) -> Asked | RowRefused:
    try:
        found: Asked = read(*arguments)
        return found
    except RowRefused as refusal:
        return refusal


def _last_turn(draft: Any, references: list[str]) -> Asked:
    messages = finished(draft, "sft")["messages"]
    if any(set(turn) != {"role", "content"} for turn in messages):
        raise RowRefused("tool-calls", "a conversation with calls of tools has no answer in words to compare")
    if messages[-2:-1] == () or messages[-2]["role"] != "user":
        raise RowRefused("no-question", "no question stands before the last answer")
    return Asked(messages[:-1], tuple(references) or (str(messages[-1]["content"]),))


def _references(record: Any) -> list[str]:
    """Several right answers, where the record has a list of them."""
    if not isinstance(record, dict):
        return []
    given: list[Any] = next((record[key] for key in _REFERENCES if isinstance(record.get(key), list)), [])
    texts = [text_of(answer, "an answer").strip() for answer in given]
    if given and not all(texts):
        raise RowRefused("missing-answer", "one of the answers is empty")
    return texts


def _pair(record: Mapping[str, Any], pair: Any) -> Asked:
    if not isinstance(pair, dict):
        raise RowRefused("not-an-object", f"{PAIRS} holds something else than objects")
    question, answer = text_of(pair.get("question"), "question"), text_of(pair.get("answer"), "answer")
    if not question.strip() or not answer.strip():
        raise RowRefused("missing-answer" if question.strip() else "missing-question", f"of one of {PAIRS}")
    case = [text_of(record[key], key).strip() for key in ("description", "case", "context") if record.get(key)]
    return Asked(({"role": "user", "content": "\n\n".join([*case, question.strip()])},), (answer.strip(),))
