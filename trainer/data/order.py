"""Draft -> what the stage needs, in the order that chat templates demand. Knows turns, not files.

An optional system turn, then user and assistant in turn; an assistant's call of a tool is followed by its results.
What can be mended without inventing text is mended and noted; the rest is refused by name.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.data.drafts import Draft
from trainer.data.rows import Message, Note, RowRefused, Stage

_CONTROL = re.compile(r"<[|｜]\w[^<>|｜\n]{0,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\[gMASK\]")
_PLACEHOLDER = re.compile(r"\{\{\s*\w{1,32}\s*\}\}")


def finished(draft: Draft, stage: Stage) -> dict[str, Any]:
    """The fields of a Row. Raises RowRefused when the draft lacks what the stage learns from."""
    notes = list(draft.notes)
    if stage == "pt":
        fields: dict[str, Any] = {"text": _pretraining_text(draft)}
    elif stage in ("dpo", "rm"):
        fields = _pair(draft, notes)
    else:
        fields = {"messages": _conversation(draft, stage, notes)}
    notes += _noticed(fields)
    return {**fields, "tools": draft.tools, "notes": tuple(notes), "extra": draft.extra}


def arranged(messages: Iterable[Message], notes: list[Note]) -> list[Message]:
    """Turns in order: same speakers joined, an assistant's opening left out. Adds to `notes`. Raises RowRefused."""
    system, turns = _split_system(list(messages), notes)
    made: list[Message] = []
    for turn in turns:
        _check_filled(turn)
        if not made and turn["role"] == "assistant":
            _note(notes, "starts-with-assistant", "the assistant's turns before the first question are left out")
        elif made and turn["role"] == made[-1]["role"] != "tool":
            made[-1] = _joined(made[-1], turn, notes)
        else:
            _check_place(turn, made)
            made.append(dict(turn))
    return [*system, *(_without_leading_space(turn, notes) for turn in made)]


def _pretraining_text(draft: Draft) -> str:
    if draft.text is None:
        raise RowRefused("no-text", "stage pt learns from text; this row is a conversation, for stage sft")
    if not draft.text.strip():
        raise RowRefused("empty-text", "the text is empty")
    return draft.text


def _conversation(draft: Draft, stage: Stage, notes: list[Note]) -> tuple[Message, ...]:
    if draft.chosen is not None and stage == "sft":
        raise RowRefused("preference-row", "has a chosen and a rejected answer, which stages dpo and rm learn from")
    if draft.messages is None:
        raise RowRefused("no-turns", "is text without turns, which stage pt learns from")
    messages = arranged(draft.messages, notes)
    if stage == "ppo":
        while messages and messages[-1]["role"] != "user":
            messages.pop()
    else:
        while messages and messages[-1]["role"] != "assistant":
            dropped = messages.pop()["role"]
            if any(turn["role"] == "assistant" for turn in messages):
                _note(notes, f"ends-with-{dropped}", f"the last turn is the {dropped}'s, it is left out")
    if not messages:
        raise RowRefused("no-answer" if stage == "sft" else "no-question", f"there is nothing for stage {stage} in it")
    return tuple(messages)


def _pair(draft: Draft, notes: list[Note]) -> dict[str, Any]:
    if draft.chosen is None or draft.rejected is None or draft.messages is None:
        raise RowRefused("no-preference", "a chosen and a rejected answer are needed (stages dpo and rm)")
    messages = arranged(draft.messages, notes)
    if not messages or messages[-1]["role"] == "assistant":
        raise RowRefused("no-question", "the turns before the answers do not end with the user's")
    for name, answer in (("chosen", draft.chosen), ("rejected", draft.rejected)):
        if not answer.strip():
            raise RowRefused("empty-answer", f"{name} is empty")
    if draft.chosen == draft.rejected:
        raise RowRefused("same-answers", "chosen and rejected are the same text")
    return {"messages": tuple(messages), "chosen": draft.chosen, "rejected": draft.rejected}


def _split_system(messages: list[Message], notes: list[Note]) -> tuple[list[Message], list[Message]]:
    count = next((i for i, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    if any(turn["role"] == "system" for turn in messages[count:]):
        raise RowRefused("system-not-first", "a system turn stands behind other turns")
    texts = [turn["content"] for turn in messages[:count] if turn["content"].strip()]
    if len(texts) > 1:
        _note(notes, "systems-joined", f"{len(texts)} system turns are joined")
    system = [{"role": "system", "content": "\n".join(texts)}] if texts else []
    return system, messages[count:]


def _check_filled(turn: Message) -> None:
    if turn["role"] == "tool" or turn.get("tool_calls") or turn["content"].strip():
        return
    if turn["role"] == "assistant":
        raise RowRefused("empty-answer", "an assistant's turn is empty")
    raise RowRefused("empty-question", "a user's turn is empty")


def _check_place(turn: Message, made: list[Message]) -> None:
    after_call = bool(made) and (made[-1]["role"] == "tool" or bool(made[-1].get("tool_calls")))
    if turn["role"] == "tool" and not after_call:
        raise RowRefused("wrong-order", "a tool's result stands behind no call")
    if turn["role"] == "user" and made and made[-1]["role"] == "tool":
        raise RowRefused("wrong-order", "the user speaks before the assistant used the tool's result")


def _joined(one: Message, other: Message, notes: list[Note]) -> Message:
    content = "\n".join(text for text in (one["content"], other["content"]) if text)
    calls = [*one.get("tool_calls", ()), *other.get("tool_calls", ())]
    if not calls:
        _note(notes, "turns-joined", f"two turns of the {one['role']} in a row are joined")
    return {"role": one["role"], "content": content} | ({"tool_calls": calls} if calls else {})


def _without_leading_space(turn: Message, notes: list[Note]) -> Message:
    """Leading white space would fuse with the prompt's last token, and the answer could not be learnt."""
    if turn["role"] != "assistant" or not turn["content"][:1].isspace():
        return turn
    _note(notes, "leading-space", "white space at the start of an answer is left out")
    return {**turn, "content": turn["content"].lstrip()}


def _note(notes: list[Note], code: str, detail: str) -> None:
    if all(note.code != code for note in notes):
        notes.append(Note(code, detail))


def _noticed(fields: dict[str, Any]) -> Iterator[Note]:
    """What is kept as it is, and should be known."""
    texts = [turn["content"] for turn in fields.get("messages", ())]
    text = "\n".join((*texts, fields.get("text", ""), fields.get("chosen", ""), fields.get("rejected", "")))
    if ("<" in text or "[" in text) and (found := len(_CONTROL.findall(text))):
        yield Note("control-token", f"{found} in the text; encoded as plain text", "kept")
    if "{{" in text and (found := len(_PLACEHOLDER.findall(text))):
        yield Note("placeholder", f"{found} to fill in", "kept")
