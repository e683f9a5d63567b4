"""One choice of an answer: token ids in, text deltas out.

Joins the detokenizer and the stop strings. The same code serves streams and whole answers, so they cannot differ.
"""

from dataclasses import dataclass

import msgspec

from server.engine.messages import FinishReason, SequenceOutput, TokenLogprobs
from server.text.detokenize import Detokenizer
from server.text.stop import StopStrings
from server.text.tokenizer import Tokenizer

_FINISH_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(slots=True)
class Delta:
    """What one output added to one choice."""

    index: int
    text: str
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop id, as in vLLM


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    hidden_stop_ids: frozenset[int] = frozenset()  # the model's own: they never show as `stop_reason`
    logprob_token_ids: tuple[int, ...] = ()  # shown instead of the likeliest ones


class Choice:
    def __init__(self, index: int, tokenizer: Tokenizer, options: ChoiceOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.is_finished = False
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stop_strings, options.include_stop) if options.stop_strings else None

    def feed(self, output: SequenceOutput) -> Delta:
        """Never called again once `is_finished`."""
        ids = output.new_token_ids
        if output.finish_reason is FinishReason.STOP and not self._options.include_stop:
            ids = ids[:-1]  # the stop id is counted, not shown
        before = self.num_tokens
        delta = Delta(self.index, self._text_of(ids), self._logprobs(output), output.prompt_logprobs)
        if self._stops is not None and self._stops.matched is not None:
            self._stopped_by_string(delta, self.num_tokens - before)
        else:
            self.num_tokens += len(output.new_token_ids) - len(ids)
            self._finish_with_engine(delta, output)
        return delta

    def _logprobs(self, output: SequenceOutput) -> list[TokenLogprobs] | None:
        """Where certain tokens were asked for, they stand where the likeliest ones stood."""
        asked = self._options.logprob_token_ids
        if not asked or output.logprobs is None:
            return output.logprobs
        return [
            msgspec.structs.replace(entry, top_token_ids=list(asked), top_logprobs=entry.given_logprobs)
            for entry in output.logprobs
        ]

    def _text_of(self, ids: list[int]) -> str:
        add, stops = self._detokenizer.add, self._stops
        if stops is None:
            self.num_tokens += len(ids)
            return "".join([add(token_id) for token_id in ids])
        pieces = []
        for token_id in ids:
            # One token at a time, so that usage does not depend on how the engine's outputs were merged.
            self.num_tokens += 1
            pieces.append(stops.feed(add(token_id)))
            if stops.matched is not None:
                break
        return "".join(pieces)

    def _stopped_by_string(self, delta: Delta, num_consumed: int) -> None:
        assert self._stops is not None
        self.is_finished = True
        delta.finish_reason, delta.stop_reason = "stop", self._stops.matched
        if delta.logprobs is not None:
            delta.logprobs = delta.logprobs[:num_consumed]

    def _finish_with_engine(self, delta: Delta, output: SequenceOutput) -> None:
        if output.finish_reason is None:
            return
        self.is_finished = True
        tail = self._detokenizer.finish()
        if self._stops is not None:
            tail = self._stops.feed(tail) + self._stops.flush()
        delta.text += tail
        delta.finish_reason = _FINISH_NAMES[output.finish_reason]
        if output.stop_token_id is not None and output.stop_token_id not in self._options.hidden_stop_ids:
            delta.stop_reason = output.stop_token_id
