"""What text side an adapter was trained with, as hashes: the same ones are written by the trainer and compared by the
engine and by `system_fingerprint`.
"""

from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError
from server.store.hashes import text_hash
from server.text.render import ChatRenderer
from server.text.template import ChatTemplate, TemplateError


@dataclass(frozen=True)
class TextIdentity:
    """sha256 in hex; "" where the folder has no such file."""

    tokenizer_hash: str
    chat_template_hash: str
    default_system_prompt_hash: str | None = None  # of what the template puts before a first user's turn; None: unknown
    turn_end_id: int | None = None  # the token that the template writes after an answer


def template_hash(template: ChatTemplate | None) -> str:
    """Of the template's source; a folder without one has the empty text's hash."""
    return text_hash("" if template is None else template.source)


def text_identity(folder: Path) -> TextIdentity:
    """Of a model folder. Raises ConfigError when its template is damaged."""
    try:
        renderer = ChatRenderer.load(folder)
    except ConfigError:  # whoever encodes with it says so
        return TextIdentity(_tokenizer_hash(folder), template_hash(ChatTemplate.load(folder)))
    return identity_of(folder, renderer)


def identity_of(folder: Path, renderer: ChatRenderer) -> TextIdentity:
    """Of a model folder whose renderer is loaded."""
    hashes = _tokenizer_hash(folder), template_hash(renderer.template)
    try:
        prompt = default_system_prompt(renderer)
    except (ConfigError, TemplateError):  # a template that takes no such turn
        return TextIdentity(*hashes)
    return TextIdentity(*hashes, text_hash(prompt), renderer.turn_end_id)


def _tokenizer_hash(folder: Path) -> str:
    tokenizer = folder / "tokenizer.json"
    return text_hash(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else ""


def default_system_prompt(renderer: ChatRenderer) -> str:
    """What the template puts before a first user's turn."""
    if renderer.template is None:
        return ""
    text = renderer.render_text([{"role": "user", "content": "\0"}], add_generation_prompt=False)
    return text.partition("\0")[0]
