"""What a data file is made of: rows, and the lines of the ledger. Knows no file format and no tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # {"role", "content": str}, optional "tool_calls": [{"name", "arguments"}]
Stage = Literal["pt", "sft", "dpo", "rm", "ppo"]
Action = Literal["dropped", "repaired", "shortened", "kept"]  # "kept": used as it is, but worth knowing


class RowRefused(ValueError):
    """Why a row cannot be used. `code` is a short kebab-case reason; `detail` never holds the row's text."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Note:
    """What was changed or noticed in a row that is used all the same."""

    code: str
    detail: str = ""
    action: Action = "repaired"


@dataclass(frozen=True)
class LedgerLine:
    """One thing that happened to one row."""

    source: str
    line: int
    action: Action
    code: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One usable row.

    pt: `text`. sft: `messages`, ending with the assistant. dpo and rm: `messages` ending with the user or a tool, and
    `chosen` and `rejected`. ppo: `messages` ending with the user.
    """

    source: str
    line: int  # 1-based: line of the file; position in a JSON array
    messages: tuple[Message, ...] = ()
    text: str = ""
    chosen: str = ""
    rejected: str = ""
    tools: str = ""  # JSON list of the tools on offer, as the file had it
    notes: tuple[Note, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)  # label, department, id...: for statistics only
