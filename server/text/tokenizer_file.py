"""Reads a model folder's `tokenizer.json` and `tokenizer_config.json`, and refuses what the product cannot honour.

Knows file formats, not encoding. The vocabulary (11 MB of JSON for Qwen2) never becomes Python objects: a worker's
memory budget is about twice what the tokenizer itself needs.
"""

import ctypes
import mmap
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tokenizers

from server.errors import ConfigError

T = TypeVar("T")


class AddedToken(msgspec.Struct, frozen=True):
    """One entry of `added_tokens`; fields as in the tokenizers library."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Model(msgspec.Struct):
    type: str = "BPE"  # old files leave it out
    byte_fallback: bool = False


class _AddedTokens(msgspec.Struct):
    added_tokens: list[AddedToken] = []


class _File(msgspec.Struct):
    model: _Model  # its vocabulary and merges are skipped over
    added_tokens: msgspec.Raw = msgspec.Raw(b"[]")
    pre_tokenizer: Any = None
    decoder: Any = None


def read_added_tokens(folder: Path) -> list[AddedToken]:
    """The control tokens of a model folder, without loading its vocabulary. Raises ConfigError."""
    path = folder / "tokenizer.json"
    with _mapped(path) as data:
        return _decode(data, _AddedTokens, path).added_tokens


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, list[AddedToken]]:
    """The tokenizer without its added tokens, so that no text can ever become one, and those tokens.

    Raises ConfigError when the file is missing, damaged, not byte-level BPE, or uses a flag we cannot honour.
    """
    path = folder / "tokenizer.json"
    with _mapped(path) as data:
        file = _decode(data, _File, path)
        file.added_tokens = file.added_tokens.copy()  # a view would hold the mapping open
        _check_byte_level(file, path)
        added = msgspec.json.decode(file.added_tokens, type=list[AddedToken])
        bare = _without(data, bytes(file.added_tokens)) if added else data[:]
    try:
        inner = tokenizers.Tokenizer.from_buffer(bare)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} is not a usable tokenizer ({error}); download the model folder again") from error
    del bare
    _return_free_memory()
    inner.no_truncation()
    inner.no_padding()
    _check_added_tokens(inner, added, path)
    return inner, added


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` as a dict, empty when the folder has none. Raises ConfigError when it is damaged."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); download the model folder again") from error


def _mapped(path: Path) -> mmap.mmap:
    """The file as a mapping: reading it into the heap would leave 11 MB there for the life of the worker."""
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing. A served model folder needs it; make it once with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty; download the model folder again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _decode(data: mmap.mmap, kind: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); download the model folder again") from error


def _without(data: mmap.mmap, added_tokens: bytes) -> bytes:
    """The file with an empty `added_tokens` list: a list of objects holds bare quotes, so it is no string's text."""
    start = data.find(added_tokens)
    with memoryview(data) as view, view[:start] as head, view[start + len(added_tokens) :] as tail:
        return b"".join((head, b"[]", tail))


def _return_free_memory() -> None:
    """Parsing leaves tens of MiB of freed blocks in glibc's heap (50 for Qwen2), for good if it is not asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no need of it
    if trim is not None:
        trim(0)


def _check_byte_level(file: _File, path: Path) -> None:
    is_byte_level = "ByteLevel" in _types(file.pre_tokenizer) and "ByteLevel" in _types(file.decoder)
    if file.model.type != "BPE" or file.model.byte_fallback or not is_byte_level:
        raise ConfigError(f"{path} is a {file.model.type} tokenizer; only byte-level BPE (Qwen2's kind) can be served")


def _types(node: Any) -> set[str]:
    """Every `type` in a tree of pre-tokenizers or decoders."""
    if isinstance(node, dict):
        return {node.get("type", "")}.union(*map(_types, node.values()))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()


def _check_added_tokens(inner: tokenizers.Tokenizer, added: list[AddedToken], path: Path) -> None:
    for token in added:
        fault = _fault(inner, token)
        if fault:
            raise ConfigError(f"{path}: added token {token.content!r} {fault}; remove it or serve another model")


def _fault(inner: tokenizers.Tokenizer, token: AddedToken) -> str | None:
    if token.single_word:
        return "has single_word=true, which is not supported"
    if len(token.content) < 2:
        return "is a single character, so ordinary text could not be told from it"
    if token.normalized and inner.normalizer and inner.normalizer.normalize_str(token.content) != token.content:
        return "has normalized=true and is changed by the normalizer, which is not supported"
    if token.id in inner.encode(token.content, add_special_tokens=False).ids:
        return "is also an ordinary word of the vocabulary, so text could forge it"
    return None
