"""One value of a file -> drafts of rows: knows the keys that data sets use. Nothing is registered, all is recognised.

In the order in which they are tried: preference pairs and ranked answers, lists of turns, one question and its answer
(with an optional history), ToolAlpaca's records, text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from trainer.data import tool_alpaca
from trainer.data.drafts import Draft
from trainer.data.rows import Message, Note, RowRefused
from trainer.data.turns import looks_like_turn, message, messages_of, text_of

TURN_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
QUESTION_KEYS = (
    "instruction", "instruct", "prompt", "query", "question", "ask", "input", "content", "human", "user",
    "问题", "题目", "问", "提问",
)  # fmt: skip
ANSWER_KEYS = (
    "output", "response", "completion", "answer", "target", "summary", "assistant", "答案", "回答", "答", "回复",
)  # fmt: skip
TEXT_KEYS = ("text", "content", "document")
# Any other key is kept beside the row when its value is short: a label, a department, a score, an id.
CONTENT_KEYS = frozenset((
    *TURN_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, *TEXT_KEYS, "system", "tools", "history", "chosen", "rejected", "title",
))  # fmt: skip
MAX_EXTRA = 64  # characters
_NO_QUESTION = frozenset(("", "无", "无。", "如题", "如题。", "同上", "暂无"))
_SCALARS = (str, int, float)
_EXAM_KEYS = ("options", "选项", "choices")
_HH = re.compile(r"\n\n(Human|Assistant):")
_PLAIN_KEY = re.compile(r"[A-Za-z_]{1,24}")


def drafts(value: Any) -> list[Draft | RowRefused]:
    """One draft for most values; several, or why not, for a record of several conversations. Raises RowRefused."""
    if isinstance(value, list):
        return [Draft(messages_of(value, "the list"))]
    if isinstance(value, str):
        return [Draft(text=text_of(value, "the string"))]
    if not isinstance(value, dict):
        raise RowRefused("not-an-object", f"an object is expected, this is a {type(value).__name__}")
    found = _recognised(value)
    if found is None:
        lowered = {key.strip().lower(): item for key, item in value.items()}
        found = _recognised(lowered) if lowered.keys() != value.keys() else None
    if found is None:
        raise RowRefused("unknown-shape", f"no known shape has the keys {_keys(value)}")
    return found


def _recognised(value: Mapping[str, Any]) -> list[Draft | RowRefused] | None:
    if "Function_Description" in value:
        return tool_alpaca.drafts(value)
    draft = _preference(value) or _chat(value) or _question(value) or _text(value)
    if draft is None:
        return None
    if value.get("tools"):
        draft.tools = _tools(value["tools"])
    draft.extra = {
        key: text_of(str(item), key)
        for key, item in value.items()
        if key not in CONTENT_KEYS and isinstance(item, _SCALARS) and len(str(item)) <= MAX_EXTRA
    }
    return [draft]


def _preference(value: Mapping[str, Any]) -> Draft | None:
    if "chosen" not in value or "rejected" not in value:
        return None
    chosen, rejected = value["chosen"], value["rejected"]
    if isinstance(chosen, str) and _HH.match(chosen) and isinstance(rejected, str):
        messages, answer = _hh(chosen)
        return Draft(messages, chosen=answer, rejected=_hh(rejected)[1])
    prompt = _chat(value) or _asked(value)
    if prompt is None:
        if not isinstance(chosen, list) or len(chosen) < 2:
            raise RowRefused("no-question", "chosen and rejected stand there without what they answer")
        prompt = Draft(messages_of(chosen[:-1], "chosen"))
    return Draft(prompt.messages, chosen=_last_answer(chosen, "chosen"), rejected=_last_answer(rejected, "rejected"))


def _last_answer(value: Any, where: str) -> str:
    """Of a string, of one turn, or of a whole conversation."""
    if isinstance(value, dict):
        value = [value]
    return str(messages_of(value, where)[-1]["content"]) if isinstance(value, list) else text_of(value, where)


def _hh(text: str) -> tuple[list[Message], str]:
    """A whole dialogue as one string, as in Anthropic's hh-rlhf: prompt and last answer."""
    parts = _HH.split(text_of(text, "chosen"))[1:]
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    messages = [message(role, part.strip()) for role, part in zip(roles, parts[1::2], strict=True)]
    return messages[:-1], str(messages[-1]["content"])


def _chat(value: Mapping[str, Any]) -> Draft | None:
    for key in TURN_KEYS:
        if key in value:
            system = [message("system", text_of(value["system"], "system"))] if value.get("system") else []
            return Draft(system + messages_of(value[key], key))
    return None


def _question(value: Mapping[str, Any]) -> Draft | None:
    key = next((key for key in ANSWER_KEYS if key in value and key != _question_key(value)), None)
    draft = _asked(value) if key else None
    if key is None or draft is None or draft.messages is None:
        return None
    if any(name in value for name in _EXAM_KEYS) or ("A" in value and "B" in value):
        raise RowRefused("exam-question", "a multiple-choice question is for evaluation, not for training")
    answer = value[key]
    if isinstance(answer, list) and len(answer) > 1 and all(isinstance(item, str) for item in answer):
        draft.chosen, draft.rejected = text_of(answer[0], key), text_of(answer[-1], key)
        return draft
    if isinstance(answer, list) and answer and looks_like_turn(answer[0]):
        draft.messages += messages_of(answer, key)
    else:
        draft.messages.append(message("assistant", text_of(answer, key)))
    return draft


def _asked(value: Mapping[str, Any]) -> Draft | None:
    """System prompt, history and question; with no answer yet."""
    key = _question_key(value)
    if key is None:
        return None
    messages = [message("system", text_of(value["system"], "system"))] if value.get("system") else []
    messages += _history(value.get("history"))
    if isinstance(value[key], list):
        return Draft(messages + messages_of(value[key], key))
    notes = []
    question = text_of(value[key], key)
    if key == "ask" and question.strip() in _NO_QUESTION and value.get("title"):
        question = text_of(value["title"], "title")
        notes.append(Note("question-from-title", "ask says nothing"))
    if key.startswith("instruct") and value.get("input"):
        question = "\n".join(filter(None, (question, text_of(value["input"], "input"))))
    return Draft([*messages, message("user", question)], notes=notes)


def _question_key(value: Mapping[str, Any]) -> str | None:
    return next((key for key in QUESTION_KEYS if key in value), None)


def _history(history: Any) -> list[Message]:
    if isinstance(history, str) and history.lstrip().startswith("["):
        try:
            history = json.loads(history)
        except (ValueError, RecursionError):
            raise RowRefused("bad-history", "history is text that is not valid JSON") from None
    if not history:
        return []
    if not isinstance(history, list):
        raise RowRefused("bad-history", "history must be a list of [question, answer] pairs")
    if not all(isinstance(pair, dict) or (isinstance(pair, list) and len(pair) == 2) for pair in history):
        raise RowRefused("bad-history", "history must be a list of [question, answer] pairs")
    return messages_of(history, "history")


def _text(value: Mapping[str, Any]) -> Draft | None:
    for key in TEXT_KEYS:
        if key in value:
            return Draft(text=text_of(value[key], key))
    asked = _asked(value)
    return asked if asked is not None and "prompt" in value else None  # a prompt alone is enough for ppo


def _tools(tools: Any) -> str:
    return text_of(tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False), "tools")


def _keys(value: Mapping[str, Any]) -> str:
    """Names only: what stands there as a key in a broken file may be text."""
    return ", ".join(key for key in list(value)[:8] if _PLAIN_KEY.fullmatch(key)) or "(none that is a plain name)"
