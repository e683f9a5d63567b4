"""Beam search over one prompt, with the results of transformers' `generate(num_beams=…)`.

Every step: the log-probabilities of each beam's next token, edited as the parameters say, are added to the beam's
score; of all continuations the best `num_beams` that go on become the next beams, and those among the best `num_beams`
that end become hypotheses, of which the best `num_beams` are kept. Knows nothing about the model, the KV store or the
engine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.backends.hf.chunks import chunk_peaks, largest
from server.engine.backends.hf.history import TokenHistory
from server.engine.backends.hf.logit_edits import edit_logits
from server.engine.messages import FinishReason, SamplingParams


class UnusableLogits(ValueError):
    """The model's output is not numbers, or the request's rules leave no token that could come next."""


@dataclass(slots=True)
class Beam:
    tokens: list[int]  # output only
    score: float  # summed log-probabilities
    history: TokenHistory


@dataclass(frozen=True, slots=True)
class Hypothesis:
    tokens: list[int]  # output only, with the stop id if one ended it
    score: float  # summed log-probabilities / length ** length_penalty
    finish_reason: FinishReason  # STOP or LENGTH
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class _Continuation:
    """One more token behind a beam."""

    parent: int
    token_id: int
    score: float
    has_ended: bool


class BeamSearch:
    """`stop_ids` are those that really stop it (the model's own left out under ignore_eos)."""

    def __init__(self, prompt: list[int], params: SamplingParams, stop_ids: frozenset[int], num_results: int) -> None:
        self.params = params
        self.stop_ids = stop_ids
        self.num_results = num_results
        self.beams = [Beam([], 0.0, TokenHistory(prompt, params, stop_ids))]  # best first
        self._hypotheses: list[Hypothesis] = []  # best first
        self._length = 0  # of every beam

    @property
    def is_done(self) -> bool:
        return not self.beams

    def results(self) -> list[Hypothesis]:
        """The `num_results` best, best first; complete once the search is done."""
        return self._hypotheses[: self.num_results]

    def advance(self, logits: Tensor) -> list[int]:
        """One step. `logits` is `[beams, V]`, raw, what follows each of `beams`. Returns, for each new beam, the place
        of the beam it continues; [] when the search is over. Raises UnusableLogits."""
        continuations = self._continuations(self._scores(logits))
        self._length += 1
        self._keep_hypotheses([one for one in continuations[: self.params.num_beams] if one.has_ended])
        running = [one for one in continuations if not one.has_ended][: self.params.num_beams]
        if not running or self._is_decided(running[0].score):
            self.beams = []
            return []
        self.beams = [self._grown(one) for one in running]
        return [one.parent for one in running]

    def _scores(self, logits: Tensor) -> Tensor:
        """float32 `[beams, V]`: what each continuation's score would be. The edits act on log-probabilities, not on
        logits: that is where transformers has them in beam search."""
        scores = logits.float().log_softmax(-1)
        if not scores.amax().isfinite():
            raise UnusableLogits("The model's output is not a number (NaN or infinity).")
        histories = [beam.history for beam in self.beams]
        if any(history.edits_logits for history in histories):
            edit_logits(scores, histories)
        return scores.add_(scores.new_tensor([beam.score for beam in self.beams])[:, None])

    def _continuations(self, scores: Tensor) -> list[_Continuation]:
        """The best, best first: so many that `num_beams` are left even if every beam's every stop id is among them."""
        vocab_size = scores.shape[-1]
        count = max(2, 1 + len(self.stop_ids)) * self.params.num_beams
        flat = scores.view(1, -1)
        values, places = largest(flat, chunk_peaks(flat), count)
        is_last = self._length + 1 >= self.params.max_tokens
        found = [
            _Continuation(
                parent=place // vocab_size,
                token_id=place % vocab_size,
                score=value,
                has_ended=is_last or place % vocab_size in self.stop_ids,
            )
            for value, place in zip(values[0].tolist(), places[0].tolist(), strict=True)
            if value > float("-inf")
        ]
        if not found and not self._hypotheses:
            raise UnusableLogits("The request's rules leave no token that could come next.")
        return found

    def _keep_hypotheses(self, ended: list[_Continuation]) -> None:
        scores = self._by_length([one.score for one in ended], self._length)
        for one, score in zip(ended, scores, strict=True):
            stop_id = one.token_id if one.token_id in self.stop_ids else None
            reason = FinishReason.LENGTH if stop_id is None else FinishReason.STOP
            tokens = [*self.beams[one.parent].tokens, one.token_id]
            self._hypotheses.append(Hypothesis(tokens, score, reason, stop_id))
        self._hypotheses.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self._hypotheses[self.params.num_beams :]

    def _is_decided(self, best_score: float) -> bool:
        """All hypotheses are there, and no beam is expected to do better.

        early_stopping: True expects nothing of the beams, False that their best keeps its score at its present length,
        "never" that it keeps its score up to the most favourable length."""
        if len(self._hypotheses) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        hopes_for_length = self.params.early_stopping == "never" and self.params.length_penalty > 0.0
        length = self.params.max_tokens if hopes_for_length else self._length
        return self._by_length([best_score], length)[0] <= self._hypotheses[-1].score

    def _by_length(self, scores: list[float], length: int) -> list[float]:
        """Divided in float32, as the reference does."""
        try:
            divisor = float(length) ** self.params.length_penalty
        except OverflowError:
            divisor = float("inf")
        divided: list[float] = (torch.tensor(scores, dtype=torch.float32) / divisor).tolist()
        return divided

    def _grown(self, one: _Continuation) -> Beam:
        parent = self.beams[one.parent]
        history = parent.history.fork()
        history.accept(one.token_id)
        return Beam([*parent.tokens, one.token_id], one.score, history)
