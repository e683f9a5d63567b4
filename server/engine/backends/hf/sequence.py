"""One token stream of the hf backend, from queue to end."""

import random
from dataclasses import dataclass, field

from server.engine.messages import FinishReason, Generate, SamplingParams, SequenceOutput, TokenLogprobs

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM


@dataclass(eq=False, slots=True)
class Sequence:
    """`stop_ids` are those that really stop it (the model's own left out under ignore_eos)."""

    request: Generate
    index: int
    stop_ids: frozenset[int]
    deadline: float | None = None  # time.monotonic()
    adapter_slot: int = -1  # -1 is the base model
    output: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)  # how often each output id came
    num_cached: int = 0  # KV cells written
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    _rng: random.Random | None = None
    _penalised: dict[int, None] | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def reservation(self) -> int:
        """The most KV cells it can come to need."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt)

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def wants_logprobs(self) -> bool:
        """Asking for given ids' logprobs asks for logprobs."""
        return self.params.logprobs is not None or bool(self.params.logprob_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Only the first of n choices: the prompt is the same for all."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @property
    def has_count_penalty(self) -> bool:
        return self.params.presence_penalty != 0.0 or self.params.frequency_penalty != 0.0

    @property
    def banned_ids(self) -> frozenset[int]:
        """Stop ids, until min_tokens have been generated."""
        return self.stop_ids if len(self.output) < self.params.min_tokens else frozenset()

    @property
    def edits_logits(self) -> bool:
        params = self.params
        return bool(params.logit_bias or self.banned_ids or params.repetition_penalty != 1.0 or self.has_count_penalty)

    def uniform(self) -> float:
        """The next number in [0, 1) of this sequence's own stream: batch mates do not change it."""
        if self._rng is None:
            seed = self.params.seed
            self._rng = random.Random(None if seed is None else str(seed + self.index))
        return self._rng.random()

    def penalised_ids(self) -> list[int]:
        """Each prompt or output id once, for the repetition penalty."""
        if self._penalised is None:
            self._penalised = dict.fromkeys([*self.prompt, *self.output])
        return list(self._penalised)

    def accept(self, token_id: int) -> SequenceOutput:
        """Take the next token; the output says whether it was the last."""
        self.output.append(token_id)
        if self._penalised is not None:
            self._penalised[token_id] = None
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        news = self.news([token_id])
        if token_id in self.stop_ids:
            news.finish_reason, news.stop_token_id = FinishReason.STOP, token_id
        elif len(self.output) >= self.params.max_tokens:
            news.finish_reason = FinishReason.LENGTH
        return news

    def news(self, new_token_ids: list[int], finish_reason: FinishReason | None = None) -> SequenceOutput:
        """An output, with the prompt's logprobs if they are complete and have not been sent yet."""
        output = SequenceOutput(self.request.request_id, self.index, new_token_ids, len(self.output), finish_reason)
        if self.is_prefilled:
            output.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return output
