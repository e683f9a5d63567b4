"""Who speaks: the names that data files give to the parties of a conversation."""

import re
from typing import Literal

Role = Literal["system", "user", "assistant", "call", "tool"]

_NAMES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer", "系统"),
    "user": (
        "user", "human", "client", "seeker", "patient", "customer", "usr", "speaker",
        "用户", "来访者", "求助者", "患者", "病人", "客户", "问", "提问者",
    ),
    "assistant": (
        "assistant", "gpt", "chatgpt", "bot", "ai", "model", "counselor", "counsellor", "supporter", "therapist",
        "doctor", "listener",
        "助手", "助理", "心理咨询师", "咨询师", "支持者", "医生", "客服", "机器人", "答", "回答者",
    ),
    "call": ("function_call", "function-call", "tool_call", "tool_calls"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
}  # fmt: skip
ROLES: dict[str, Role] = {name: role for role, names in _NAMES.items() for name in names}
_SPEAKERS = "|".join(sorted((name for role in ("system", "user", "assistant") for name in _NAMES[role]), key=len)[::-1])
_SPEAKS = re.compile(rf"\s*(?P<name>{_SPEAKERS})\s*[:：]\s*(?P<text>.*)", re.IGNORECASE | re.DOTALL)


def role_of(name: object) -> Role | None:
    """The canonical role of a party's name, None for a stranger."""
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def spoken(text: str) -> tuple[Role, str] | None:
    """`来访者：你好` -> ("user", "你好"); None when the text does not start with a known speaker."""
    found = _SPEAKS.match(text)
    return (ROLES[found["name"].lower()], found["text"].strip()) if found else None
