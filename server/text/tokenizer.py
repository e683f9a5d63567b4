"""Text to token ids and back, as the stock tokenizer does it, without ever turning ordinary text into a control token.

A control token is any of the tokenizer's added tokens, flagged special or not. The inner tokenizer does not know
them; we match them ourselves, and only where the caller says that the text may hold them. Knows nothing about chats.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from server.text.tokenizer_file import AddedToken, read_tokenizer, read_tokenizer_config

MAX_CACHED_TOKENS = 32_768  # about 5 MiB; a running text uses far fewer different tokens
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Unicode's White_Space, which lstrip/rstrip flags eat. Python's str.strip() would also take U+001C..U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"  # noqa: E501
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextError(ValueError):
    """Text or messages that cannot be encoded. `param` names the place, such as `messages[0].content`."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Tokenizer:
    """A byte-level BPE tokenizer. Immutable but for a bounded cache, so any thread may use it."""

    def __init__(self, inner: tokenizers.Tokenizer, added: list[AddedToken], config: Mapping[str, Any]) -> None:
        self._inner = inner
        self._added = {token.content: token for token in added}
        self._contents = {token.id: token.content for token in added}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")
        self._split = re.compile(f"({self._pattern.pattern})").split
        self._prefix, self._suffix = _post_processor_ids(inner)
        self.control_tokens: Mapping[str, int] = MappingProxyType({t.content: t.id for t in added})
        self.control_ids = frozenset(self._contents)
        self.special_ids = frozenset(token.id for token in added if token.special)
        self.special_tokens = _special_tokens(config)
        self.pieces: Mapping[int, str | bytes] = _Pieces(self)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a model folder. Raises ConfigError with a cure when it holds no byte-level BPE tokenizer."""
        inner, added = read_tokenizer(folder)
        return cls(inner, added, read_tokenizer_config(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token id. The model's embedding may be larger (padding rows)."""
        return max(self._inner.get_vocab_size(with_added_tokens=False), *(i + 1 for i in self.control_ids), 0)

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens.get("eos_token")
        if eos is None:
            return None
        token_id: int | None = self.control_tokens.get(eos, self._inner.token_to_id(eos))
        return token_id

    def encode_plain(self, text: str) -> list[int]:
        """Encode text in which nothing is a control token. Raises TextError for lone surrogates."""
        if not text:
            return []
        try:
            token_ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise TextError(_surrogate_fault(text)) from None
        if not self.control_ids.isdisjoint(token_ids):
            raise TextError("this text encodes to a control token of the model and is refused")
        return token_ids

    def encode_raw(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode a raw prompt: control tokens in it count, and BOS/EOS are added where the model's own tokenizer does.

        The same ids as stock `tokenizer(text, add_special_tokens=...)`; but tokens flagged `normalized` must stand in
        the text as they are, not in another Unicode spelling. Raises TextError for lone surrogates.
        """
        token_ids = self.encode_rendered(text, "")
        return [*self._prefix, *token_ids, *self._suffix] if add_special_tokens else token_ids

    def encode_rendered(self, text: str, break_char: str) -> list[int]:
        """Encode a rendered chat: whole control tokens become ids; `break_char`, inside forged ones, vanishes."""
        parts = self._split(text)  # plain, control, plain, ..., control, plain
        token_ids: list[int] = []
        eats = False  # the control token before this part takes the white space after it
        for index in range(0, len(parts), 2):
            plain = parts[index].replace(break_char, "") if break_char else parts[index]
            control = self._added[parts[index + 1]] if index + 1 < len(parts) else None
            if eats:
                plain = plain.lstrip(_WHITE_SPACE)
            if control is not None and control.lstrip:
                plain = plain.rstrip(_WHITE_SPACE)
            token_ids += self.encode_plain(plain)
            if control is not None:
                token_ids.append(control.id)
                eats = control.rstrip
        return token_ids

    def find_control(self, text: str, start: int = 0) -> tuple[int, int] | None:
        """Where the first control token at or after `start` begins, and its id."""
        match = self._pattern.search(text, start)
        return (match.start(), self.control_tokens[match.group()]) if match else None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD, but an incomplete character at the end is dropped.

        Raises ValueError for an id that the tokenizer does not have.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped)
        return codecs.utf_8_decode(data, "replace", False)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for. Raises ValueError for an id that the tokenizer does not have."""
        piece = self.pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def token_text(self, token_id: int) -> str:
        """For humans: the token's bytes as text, U+FFFD where they are part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def spell(self, token_id: int) -> bytes:
        """`token_bytes` without the cache."""
        if token_id in self._contents:
            return self._contents[token_id].encode()
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            raise ValueError(f"token id {token_id} is not in the tokenizer (its ids end at {self.vocab_size - 1})")
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # an entry outside the byte alphabet stands for itself
            return token.encode()


class _Pieces(dict[int, str | bytes]):
    """Token id → its text if it is whole UTF-8, else its bytes. A miss fills it; full, it starts afresh."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | bytes:
        data = self._tokenizer.spell(token_id)
        try:
            piece: str | bytes = data.decode()
        except UnicodeDecodeError:
            piece = data
        if len(self) >= MAX_CACHED_TOKENS:
            self.clear()
        self[token_id] = piece
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _post_processor_ids(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the model's own post-processor puts before and after a text."""
    bare = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; a value is a string or a serialized AddedToken."""
    named = {name: config.get(name) for name in SPECIAL_TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _surrogate_fault(text: str) -> str:
    found = _SURROGATE.search(text)
    assert found is not None, "the tokenizer refuses nothing but lone surrogates"
    return (
        f"the text holds a lone surrogate (U+{ord(found.group()):04X} at character {found.start()}), which is no valid "
        "Unicode; send whole surrogate pairs or remove it"
    )
