"""Rows -> token ids and labels, through the server's own renderer: what is trained is what will be served.

Knows no template of its own. A label is the token itself where the model should learn it, else -100.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.config import TrainConfig
from trainer.data.rows import LedgerLine, Row, RowRefused
from trainer.data.tool_text import flattened, uses_tools
from trainer.examples.base_facts import limits_of, pad_id
from trainer.examples.sequences import IGNORED, Example
from trainer.examples.truncate import Fitted, Limits, fit, learned_runs

LossOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class ChatLabels:
    """sft: one example per conversation, labelled on the assistant's text and its stop token.

    `loss_on`: assistant, every answer; last, only the last one; all, every token.
    """

    renderer: ChatRenderer
    limits: Limits
    loss_on: LossOn = "assistant"

    def of(self, row: Row) -> Iterator[Example | LedgerLine]:
        """The row's example, after what happened to it. Raises RowRefused."""
        try:
            told = with_tools(row, self.renderer)
            fitted = fit(told.row.messages, self.renderer, self.limits, told.tools)
        except TextError as error:
            raise RowRefused("bad-text", str(error)) from None
        except TemplateError as error:
            raise RowRefused("template", str(error)) from None
        yield from told.notes
        yield from _shortened(row, fitted)
        yield from _forged(row, self.renderer)
        yield Example(fitted.text.token_ids, self._labels(fitted), row.source, row.line)

    def _labels(self, fitted: Fitted) -> list[int]:
        token_ids, trained = fitted.text.token_ids, fitted.text.trained
        if self.loss_on == "all":
            return list(token_ids)
        first = learned_runs(trained)[-1][0] if self.loss_on == "last" else 0
        return [
            token if learn and index >= first else IGNORED
            for index, (token, learn) in enumerate(zip(token_ids, trained, strict=True))
        ]


@dataclass(frozen=True)
class TextLabels:
    """pt: every token of a text is learned, and the `end_id` after it. Long texts become pieces of about equal size."""

    renderer: ChatRenderer
    max_length: int
    end_id: int

    def of(self, row: Row) -> Iterator[Example | LedgerLine]:
        """The row's pieces, at most `max_length` tokens each. Raises RowRefused."""
        try:
            token_ids = [*self.renderer.tokenizer.encode_plain(row.text), self.end_id]
        except TextError as error:
            raise RowRefused("bad-text", str(error)) from None
        yield from _forged(row, self.renderer)
        num_pieces = -(-len(token_ids) // self.max_length)
        edges = [len(token_ids) * n // num_pieces for n in range(num_pieces + 1)]
        for start, end in itertools.pairwise(edges):
            if end - start > 1:
                piece = token_ids[start:end]
                yield Example(piece, list(piece), row.source, row.line)


def labels_of(config: TrainConfig, base: Path, renderer: ChatRenderer) -> ChatLabels | TextLabels:
    """Those of stage pt or sft, as the config and the base's folder have it. Raises ConfigError."""
    limits = limits_of(config, base)
    if config.stage == "pt":
        return TextLabels(renderer, limits.max_length, pad_id(base))
    return ChatLabels(renderer, limits, config.loss_on)


def label(row: Row, labels: ChatLabels | TextLabels) -> Iterator[Example | LedgerLine]:
    """The row's examples and what happened to it; a refused row becomes a line of the ledger."""
    try:
        yield from labels.of(row)
    except RowRefused as error:
        yield LedgerLine(row.source, row.line, "dropped", error.code, error.detail)


@dataclass(frozen=True)
class ToolRow:
    """A row as its base's template takes it: with tools beside the messages, or with everything written as text."""

    row: Row
    tools: Sequence[Any] | None = None
    notes: tuple[LedgerLine, ...] = ()


def with_tools(row: Row, renderer: ChatRenderer) -> ToolRow:
    """Where the template has no place for tools, the row's own become plain text. Raises RowRefused for bad tools."""
    if not uses_tools(row):
        return ToolRow(row)
    if renderer.template is not None and "tool" in renderer.template.source:
        return ToolRow(row, _tools(row))
    note = LedgerLine(row.source, row.line, "kept", "tools-as-text", "the chat template has no place for tools")
    return ToolRow(replace(row, messages=flattened(row), tools=""), None, (note,))


def _tools(row: Row) -> Sequence[Any] | None:
    if not row.tools:
        return None
    try:
        tools = json.loads(row.tools)
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise RowRefused("bad-tools", "tools must be a JSON list")
    return tools


def _shortened(row: Row, fitted: Fitted) -> Iterator[LedgerLine]:
    if fitted.cuts:
        yield LedgerLine(row.source, row.line, "shortened", "too-long", "; ".join(fitted.cuts))


def _forged(row: Row, renderer: ChatRenderer) -> Iterator[LedgerLine]:
    """A control token's text inside a message stays plain text; that it was there is worth knowing."""
    texts = [row.text, row.chosen, row.rejected, *(str(message.get("content", "")) for message in row.messages)]
    found = {token for token in renderer.tokenizer.control_tokens for text in texts if token in text}
    if found and not any(note.code == "control-token" for note in row.notes):
        detail = f"{', '.join(sorted(found))} in the text is trained as plain text"
        yield LedgerLine(row.source, row.line, "kept", "control-token", detail)
