"""What text side an adapter was trained with, as hashes: the same ones are written by the trainer and compared by the
engine and by `system_fingerprint`.
"""

from dataclasses import dataclass
from pathlib import Path

from server.store.hashes import text_hash
from server.text.template import ChatTemplate


@dataclass(frozen=True)
class TextIdentity:
    """sha256 in hex; "" where the folder has no such file."""

    tokenizer_hash: str
    chat_template_hash: str


def template_hash(template: ChatTemplate | None) -> str:
    """Of the template's source; a folder without one has the empty text's hash."""
    return text_hash("" if template is None else template.source)


def text_identity(folder: Path) -> TextIdentity:
    """Of a model folder. Raises ConfigError when its template is damaged."""
    tokenizer = folder / "tokenizer.json"
    tokenizer_hash = text_hash(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else ""
    return TextIdentity(tokenizer_hash, template_hash(ChatTemplate.load(folder)))
