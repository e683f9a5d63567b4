"""What one token stream has already said, kept so that a step costs what is new and not what is old.

Used by penalties, bans and the n-gram rule of `logit_edits`; a beam forks its parent's. Knows nothing about logits.
"""

from array import array
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Self

from server.engine.messages import SamplingParams

NGrams = dict[tuple[int, ...], list[int]]  # all but the last id of an n-gram -> the last ids seen behind them


class TokenHistory:
    """Of one stream's prompt and output, what its parameters ask for. What only the prompt decides is worked out once,
    when first needed, and shared by forks. `stop_ids` are those that really stop the stream."""

    def __init__(self, prompt: list[int], params: SamplingParams, stop_ids: frozenset[int]) -> None:
        self.params = params
        self.stop_ids = stop_ids
        self.num_output = 0
        self.output_ids = array("q")  # each once, in order of first use
        self.output_counts = array("q")  # how often each of them came
        self._places: dict[int, int] = {}  # id -> its place in the two arrays
        self._ngrams: NGrams = {}  # those that end in the output
        self._tail = _last(prompt, params.no_repeat_ngram_size - 1)
        self._prompt = _Prompt(prompt, params.no_repeat_ngram_size)

    @property
    def has_count_penalty(self) -> bool:
        return self.params.presence_penalty != 0.0 or self.params.frequency_penalty != 0.0

    @property
    def banned_stops(self) -> frozenset[int]:
        """Stop ids, until min_tokens have been generated."""
        return self.stop_ids if self.num_output < self.params.min_tokens else frozenset()

    @property
    def edits_logits(self) -> bool:
        params = self.params
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1.0
            or self.has_count_penalty
            or params.no_repeat_ngram_size
            or self.banned_stops
        )

    @property
    def prompt_ids(self) -> "array[int]":
        """Each prompt id once."""
        return self._prompt.ids

    def ngram_endings(self) -> list[int]:
        """Ids that would complete an n-gram for the second time (an id may come twice here)."""
        size = self.params.no_repeat_ngram_size
        if size == 0 or len(self._tail) < size - 1:
            return []
        return self._prompt.ngrams.get(self._tail, []) + self._ngrams.get(self._tail, [])

    def accept(self, token_id: int) -> None:
        """Take the next output token."""
        self.num_output += 1
        if self.params.repetition_penalty != 1.0 or self.has_count_penalty:
            self._count(token_id)
        size = self.params.no_repeat_ngram_size
        if size > 0:
            if len(self._tail) == size - 1:
                self._ngrams.setdefault(self._tail, []).append(token_id)
            self._tail = _last([*self._tail, token_id], size - 1)

    def fork(self) -> Self:
        """A copy that grows on its own; the prompt's part is shared."""
        twin = object.__new__(type(self))
        twin.params, twin.stop_ids, twin.num_output = self.params, self.stop_ids, self.num_output
        twin.output_ids, twin.output_counts = self.output_ids[:], self.output_counts[:]
        twin._places = self._places.copy()
        twin._ngrams = {beginning: endings[:] for beginning, endings in self._ngrams.items()}
        twin._tail, twin._prompt = self._tail, self._prompt
        return twin

    def _count(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self.output_ids))
        if place == len(self.output_ids):
            self.output_ids.append(token_id)
            self.output_counts.append(0)
        self.output_counts[place] += 1


class _Prompt:
    """What a prompt contributes; each part is worked out when first asked for."""

    def __init__(self, token_ids: list[int], ngram_size: int) -> None:
        self._token_ids = token_ids
        self._ngram_size = ngram_size
        self._ids: array[int] | None = None
        self._ngrams: NGrams | None = None

    @property
    def ids(self) -> "array[int]":
        if self._ids is None:
            self._ids = array("q", dict.fromkeys(self._token_ids))
        return self._ids

    @property
    def ngrams(self) -> NGrams:
        if self._ngrams is None:
            self._ngrams = {}
            shifted = (islice(self._token_ids, start, None) for start in range(self._ngram_size))
            for *beginning, ending in zip(*shifted, strict=False):
                self._ngrams.setdefault(tuple(beginning), []).append(ending)
        return self._ngrams


def _last(token_ids: Seq[int], count: int) -> tuple[int, ...]:
    return tuple(token_ids[-count:]) if count > 0 else ()
