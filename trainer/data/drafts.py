"""What one value of a file holds, before the stage decides what of it is needed. Knows no keys and no files."""

from dataclasses import dataclass, field

from trainer.data.rows import Message, Note


@dataclass
class Draft:
    """None: the value has no such thing."""

    messages: list[Message] | None = None
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tools: str = ""
    notes: list[Note] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
