"""ToolAlpaca's records (github.com/tangqiaoyu/ToolAlpaca): one API, several conversations. Knows no other shape."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from trainer.data.drafts import Draft
from trainer.data.rows import Message, RowRefused
from trainer.data.turns import message, text_of, tool_call


def drafts(value: Mapping[str, Any]) -> list[Draft | RowRefused]:
    """Training records hold `Instances`; evaluation ones `Instructions` with `Golden_Answers`. Raises RowRefused."""
    tools = _functions(value["Function_Description"])
    if isinstance(value.get("Instances"), list):
        return [_draft(_instance, one, tools) for one in value["Instances"]]
    asked, answers = value.get("Instructions"), value.get("Golden_Answers")
    if not isinstance(asked, list) or not isinstance(answers, list) or len(asked) != len(answers):
        raise RowRefused("unknown-shape", "an API's record needs Instances, or Instructions and as many Golden_Answers")
    return [_draft(_golden, pair, tools) for pair in zip(asked, answers, strict=True)]


def _draft(make: Callable[[Any], list[Message]], value: Any, tools: str) -> Draft | RowRefused:
    try:
        return Draft(make(value), tools=tools)
    except RowRefused as refusal:
        return refusal


def _golden(pair: tuple[Any, Any]) -> list[Message]:
    """An instruction, answered by the right calls."""
    asked, calls = pair
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise RowRefused("bad-tool-call", "Golden_Answers must hold lists of calls")
    made = [tool_call(call.get("Action"), call.get("Action_Input"), "Golden_Answers") for call in calls]
    return [
        message("user", text_of(asked, "Instructions")),
        {"role": "assistant", "content": "", "tool_calls": made},
    ]


def _instance(value: Any) -> list[Message]:
    """`intermediate_steps` are [[name, arguments, thought], result]."""
    if not isinstance(value, dict):
        raise RowRefused("not-an-object", "Instances must be objects")
    messages = [message("user", text_of(value.get("input"), "input"))]
    for step in value.get("intermediate_steps") or ():
        if not (isinstance(step, list) and len(step) == 2 and isinstance(step[0], list) and len(step[0]) >= 2):
            raise RowRefused("bad-tool-call", "intermediate_steps must be [[name, arguments, thought], result]")
        call = tool_call(step[0][0], step[0][1], "intermediate_steps")
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append(message("tool", text_of(step[1], "intermediate_steps")))
    return [*messages, message("assistant", text_of(value.get("output"), "output"))]


def _functions(described: Any) -> str:
    if not isinstance(described, dict):
        raise RowRefused("unknown-shape", "Function_Description must be an object")
    tools = [{"name": name, "description": text} for name, text in described.items() if name != "components"]
    return text_of(json.dumps(tools, ensure_ascii=False), "Function_Description")
