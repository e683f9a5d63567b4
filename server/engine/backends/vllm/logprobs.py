"""vLLM's flat log probabilities -> ours. A position lists the token itself first, then the most likely ones."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from server.engine.messages import TokenLogprobs

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


def token_logprobs(flat: "FlatLogprobs", count: int, given_ids: Sequence[int] = ()) -> list[TokenLogprobs]:
    """One entry per position that has any; `count` of the most likely, and those of `given_ids`."""
    spans = zip(flat.start_indices, flat.end_indices, strict=True)
    return [_entry(flat, start, end, count, given_ids) for start, end in spans if end > start]


def _entry(flat: "FlatLogprobs", start: int, end: int, count: int, given_ids: Sequence[int]) -> TokenLogprobs:
    best = slice(start + 1, min(start + 1 + count, end))
    return TokenLogprobs(
        token_id=flat.token_ids[start],
        logprob=flat.logprobs[start],
        rank=flat.ranks[start] or 0,
        top_token_ids=flat.token_ids[best],
        top_logprobs=flat.logprobs[best],
        given_logprobs=_given(flat, start + 1, end, given_ids) if given_ids else [],
    )


def _given(flat: "FlatLogprobs", start: int, end: int, ids: Sequence[int]) -> list[float]:
    wanted = set(ids)
    pairs = zip(islice(flat.token_ids, start, end), islice(flat.logprobs, start, end), strict=True)
    found = {token_id: logprob for token_id, logprob in pairs if token_id in wanted}
    return [found[token_id] for token_id in ids]
