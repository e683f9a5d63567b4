"""Rows -> token ids and labels, through the server's own renderer: what is trained is what will be served.

Knows no template of its own. A label is the token itself where the model should learn it, else -100.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.formats import Reject, Row

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index


@dataclass(frozen=True)
class Example:
    """One training sequence; both lists have the same length."""

    token_ids: list[int]
    labels: list[int]


def chat_examples(
    rows: Iterable[Row | Reject], renderer: ChatRenderer, max_length: int
) -> tuple[list[Example], list[Reject]]:
    """One example per conversation: labels on the assistant's text and its stop token only."""
    examples, rejects = [], []
    for row in rows:
        made = row if isinstance(row, Reject) else _chat_example(row, renderer, max_length)
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            examples.append(made)
    return examples, rejects


def text_examples(
    rows: Iterable[Row | Reject], renderer: ChatRenderer, separator_id: int, max_length: int
) -> tuple[list[Example], list[Reject]]:
    """All texts in a row, each ended by `separator_id`, cut into sequences of `max_length`; every token is learned."""
    stream: list[int] = []
    rejects = []
    for row in rows:
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            stream += [*renderer.tokenizer.encode_plain(row.text), separator_id]
        except TextError as error:
            rejects.append(Reject(row.source, row.line, str(error)))
    pieces = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [Example(piece, list(piece)) for piece in pieces if len(piece) > 1], rejects


def mask(token_ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """Labels: the token where `trained`, else IGNORED."""
    return [token if learn else IGNORED for token, learn in zip(token_ids, trained, strict=True)]


def _chat_example(row: Row, renderer: ChatRenderer, max_length: int) -> Example | Reject:
    try:
        text = renderer.render_training(list(row.messages))
    except (TextError, TemplateError) as error:
        return Reject(row.source, row.line, str(error))
    if len(text.token_ids) > max_length:
        return Reject(row.source, row.line, f"is {len(text.token_ids)} tokens long, max_length is {max_length}")
    return Example(list(text.token_ids), mask(text.token_ids, text.trained))
