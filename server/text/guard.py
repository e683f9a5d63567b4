"""Breaks every control token's text inside messages, so that after rendering only the template's own are whole.

A noncharacter (Unicode promises never to assign U+FDD0..U+FDEF) goes after the first character of each occurrence,
and to the edge of a text whose neighbour could complete one. It is taken out again when the parts are encoded.
Knows nothing of templates or token ids.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from server.text.tokenizer import TextError

NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
MAX_DEPTH = 64

# Words of the API itself, which templates compare and some build tokens from ('<|' + role + '|>').
_API_WORDS = frozenset(
    {("role", role) for role in ("system", "developer", "user", "assistant", "tool", "function")}
    | {("type", "function")}
)


class ControlGuard:
    """Knows the texts of all control tokens, each at least two characters long."""

    def __init__(self, control_tokens: Collection[str]) -> None:
        either = "|".join(map(re.escape, control_tokens)) or r"(?!)"
        self._whole = re.compile(either)
        self._first_character = re.compile(f"(?s)(?=(?:{either}))(.)")  # looking ahead finds overlapping ones too
        self._heads = tuple({token[:n] for token in control_tokens for n in range(1, len(token))})
        self._tails = tuple({token[n:] for token in control_tokens for n in range(1, len(token))})
        self._blank_heads = tuple(head for head in self._heads if head.isspace())
        self._blank_tails = tuple(tail for tail in self._tails if tail.isspace())

    def guard(self, value: Any, mark: str) -> Any:
        """A copy of a tree of dicts, lists and leaves, all its strings guarded, keys too."""
        if isinstance(value, str):
            return self._text(value, mark)
        if isinstance(value, Mapping):
            return {
                self._key(key, mark): item if _is_api_word(key, item) else self.guard(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.guard(item, mark) for item in value]
        return value

    def _inside(self, text: str, mark: str) -> str:
        if not self._whole.search(text):  # the usual case, and the faster search
            return text
        return self._first_character.sub(lambda first: first.group() + mark, text)

    def _text(self, text: str, mark: str) -> str:
        text = self._inside(text, mark)
        # A template may trim a body, so the marks stand inside its outer white space, where they hinder no trimming.
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start < end:
            opening = mark if text.startswith(self._tails, start) else ""
            closing = mark if text.endswith(self._heads, 0, end) else ""
            text = text[:start] + opening + text[start:end] + closing + text[end:]
        before = mark if text.startswith(self._blank_tails) else ""
        after = mark if text.endswith(self._blank_heads) else ""
        return before + text + after

    def _key(self, key: Any, mark: str) -> Any:
        """Templates look keys up by name: a plain word's edges stay as they are."""
        if not isinstance(key, str):
            return key
        return self._inside(key, mark) if key.isidentifier() else self._text(key, mark)


def free_marks(texts: Collection[str], taken: str) -> tuple[str, str]:
    """Two noncharacters that occur nowhere in the texts nor in `taken`. Raises TextError if there are none."""
    free = [c for c in NONCHARACTERS if c not in taken]
    found: list[str] = []
    for candidate in free:
        if not any(candidate in text for text in texts):
            found.append(candidate)
            if len(found) == 2:
                return found[0], found[1]
    raise TextError("the messages use all of Unicode's noncharacters U+FDD0..U+FDEF; remove them", "messages")


def texts_of(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(path, string) for every string of a tree, keys too. Raises TextError when it is nested too deeply."""
    if depth > MAX_DEPTH:
        raise TextError(f"{path[:80]}... is nested more than {MAX_DEPTH} levels deep", path[:80])
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield f"{path}.{key}", key
            yield from texts_of(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from texts_of(item, f"{path}[{index}]", depth + 1)


def _is_api_word(key: Any, item: Any) -> bool:
    return isinstance(item, str) and (key, item) in _API_WORDS
