"""OpenAI's and vLLM's shapes for log probabilities."""

from typing import Any

from server.engine.messages import TokenLogprobs
from server.text.detokenize import Detokenizer
from server.text.tokenizer import Tokenizer

# JSON has no -inf; OpenAI's API reference uses this value for "very unlikely".
FLOOR = -9999.0


def chat_logprobs(entries: list[TokenLogprobs], num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: one entry per generated token."""
    return {"content": [_chat_entry(entry, num_top, tokenizer) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprobs, num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    top = zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False)
    return {
        **_token(entry.token_id, entry.logprob, tokenizer),
        "top_logprobs": [_token(token_id, logprob, tokenizer) for token_id, logprob in top],
    }


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = _bytes(token_id, tokenizer)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, FLOOR), "bytes": list(raw)}


def _bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    """Embeddings have padding rows that no tokenizer knows; they show as nothing, as they do in the text."""
    try:
        return tokenizer.token_bytes(token_id)
    except ValueError:
        return b""


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    return _bytes(token_id, tokenizer).decode("utf-8", "replace")


def text_of(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """A prompt as its caller wrote it, control tokens and all."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join([detokenizer.add(token_id) for token_id in token_ids])


def completion_logprobs(
    entries: list[TokenLogprobs | None], token_ids: list[int], num_top: int, tokenizer: Tokenizer, offset: int = 0
) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion; a None entry is the prompt's first token, which has none."""
    tokens = [_text(token_id, tokenizer) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else max(entry.logprob, FLOOR) for entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, num_top, tokenizer) for entry in entries],
        "text_offset": offsets,
    }


def _top(entry: TokenLogprobs, num_top: int, tokenizer: Tokenizer) -> dict[str, float]:
    """The most likely tokens, and the chosen one where it is not among them (as OpenAI does)."""
    top = {
        _text(token_id, tokenizer): max(logprob, FLOOR)
        for token_id, logprob in zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False)
    }
    chosen = _text(entry.token_id, tokenizer)
    return {**top, chosen: max(entry.logprob, FLOOR)}


def vllm_prompt_logprobs(
    entries: list[TokenLogprobs | None] | None, tokenizer: Tokenizer
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per position a mapping of token id to logprob, rank and text."""
    if entries is None:
        return None
    return [None if entry is None else _by_id(entry, tokenizer) for entry in entries]


def _by_id(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    ranked = {
        token_id: (logprob, rank)
        for rank, (token_id, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), start=1)
    }
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {
            "logprob": max(logprob, FLOOR),
            "rank": rank,
            "decoded_token": _text(token_id, tokenizer),
        }
        for token_id, (logprob, rank) in ranked.items()
    }
