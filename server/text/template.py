"""A model folder's chat template: messages to text, in the sandbox and dialect that transformers gives such templates.

Knows jinja only; tokens and safety against forged control tokens are the renderer's affair. Reference for the dialect:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import ConfigError
from server.text.tokenizer_file import read_tokenizer_config


class TemplateError(ValueError):
    """The template refuses these messages, or fails on them; the text is the template's own."""


class ChatTemplate:
    """One compiled template. Immutable; any thread may render."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is broken at line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """The folder's template, or None if it has none. Raises ConfigError if it is damaged.

        `chat_template.jinja` wins over `chat_template` in `tokenizer_config.json`; of a named list, `default` is taken.
        """
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 ({error}); download the model folder again") from error
        source = read_tokenizer_config(folder).get("chat_template")
        return None if source is None else cls(_default_of(source, folder))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, **variables: Any
    ) -> str:
        """Text of the conversation. Raises TemplateError with the template's own message."""
        try:
            return self._template.render(messages=messages, tools=tools, **{"documents": None, **variables})
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise TemplateError(str(error) or type(error).__name__) from error


def _default_of(source: Any, folder: Path) -> str:
    if isinstance(source, list):
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if not isinstance(source, str):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list with one named 'default'; "
            "put the template into chat_template.jinja"
        )
    return source


class _GenerationBlock(jinja2.ext.Extension):
    """Accepts {% generation %}...{% endgeneration %}, which marks an assistant's text: the body, in its own scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter: no HTML escapes, and non-ASCII text as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
