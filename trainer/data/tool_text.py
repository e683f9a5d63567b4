"""Tool turns as plain text, for chat templates that have none. Knows messages; knows no template.

The convention is that of the Hermes models (github.com/NousResearch/Hermes-Function-Calling): the tools on offer stand
in the system turn, one JSON object a line within <tools>; a call is one JSON object within <tool_call>; a result comes
back as a user's turn within <tool_response>.
"""

import json
from collections.abc import Mapping
from typing import Any

from trainer.data.rows import Message, Row

_INTRODUCTION = (
    "You can call these functions:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write one line of JSON between tags, and wait for its result:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)


def uses_tools(row: Row) -> bool:
    """Whether the row has anything that `flattened` would change."""
    return bool(row.tools) or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in row.messages)


def flattened(row: Row) -> tuple[Message, ...]:
    """The row's messages with roles system, user and assistant only, still in turn."""
    made: list[Message] = []
    for turn in row.messages:
        role, content = _plain(turn)
        if made and turn["role"] == "tool" and made[-1]["role"] == "user":
            made[-1]["content"] += "\n" + content  # results of calls made together
        else:
            made.append({"role": role, "content": content})
    return tuple(_with_tools(made, row.tools) if row.tools else made)


def _plain(turn: Mapping[str, Any]) -> tuple[str, str]:
    if turn["role"] == "tool":
        return "user", f"<tool_response>\n{turn['content']}\n</tool_response>"
    calls = [f"<tool_call>\n{_json(call)}\n</tool_call>" for call in turn.get("tool_calls", ())]
    return turn["role"], "\n".join(filter(None, (turn["content"], *calls)))


def _with_tools(messages: list[Message], tools: str) -> list[Message]:
    text = _INTRODUCTION.format(tools=_one_per_line(tools))
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _one_per_line(tools: str) -> str:
    try:
        listed = json.loads(tools)
    except (ValueError, RecursionError):
        return tools
    return "\n".join(map(_json, listed)) if isinstance(listed, list) else tools


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
