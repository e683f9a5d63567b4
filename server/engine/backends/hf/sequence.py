"""One token stream of the hf backend, from queue to end."""

import random
from dataclasses import dataclass, field

from torch import Tensor

from server.engine.backends.hf.history import TokenHistory
from server.engine.messages import FinishReason, Generate, SamplingParams, SequenceOutput, TokenLogprobs

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM


@dataclass(eq=False, slots=True)
class Sequence:
    """`stop_ids` are those that really stop it (the model's own left out under ignore_eos).

    `tokens` is prompt and output; the KV store holds the adapter's virtual tokens and then the first of these. Whatever
    is not in the store yet, one token or a whole prompt, is computed by the steps to come.
    """

    request: Generate
    index: int
    stop_ids: frozenset[int]
    deadline: float | None = None  # time.monotonic()
    adapter_slot: int = -1  # -1 is the base model
    virtual_cells: Tensor | None = None  # KV cells that its adapter puts before the prompt
    row: int = -1  # in the KV store, while it runs
    arrival: int = 0  # place in the order of arrival
    num_reused: int | None = None  # prompt tokens that needed no computing when it first started
    other_beams: list["Sequence"] = field(default_factory=list)  # of the first beam: the rest, until they start
    tokens: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    num_cached: int = 0  # KV cells written
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    history: TokenHistory = field(init=False)
    _rng: random.Random | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.history = TokenHistory(self.prompt, self.params, self.stop_ids)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def num_virtual(self) -> int:
        return 0 if self.virtual_cells is None else self.virtual_cells.shape[2]

    @property
    def num_todo(self) -> int:
        """Tokens that the KV store lacks; the logits after the last of them choose the next."""
        return self.num_virtual + len(self.tokens) - self.num_cached

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is missing, or the prompt's end."""
        return self.num_todo > 1 or not self.output

    @property
    def is_beam(self) -> bool:
        return self.params.num_beams > 1

    @property
    def reservation(self) -> int:
        """KV cells that each beam holds from the start; 0 for what is not a beam."""
        if not self.is_beam:
            return 0
        return self.num_virtual + len(self.prompt) + self.params.max_tokens

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def wants_logprobs(self) -> bool:
        """Asking for given ids' logprobs asks for logprobs."""
        return self.params.logprobs is not None or bool(self.params.logprob_token_ids)

    @property
    def may_reuse_prefix(self) -> bool:
        """Cells that are copied give no logits."""
        return not self.wants_prompt_logprobs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Only the first of n choices, for the prompt is the same for all, and only once."""
        return self.params.prompt_logprobs is not None and self.index == 0 and not self.output

    def uniform(self) -> float:
        """The next number in [0, 1) of this sequence's own stream: batch mates do not change it."""
        if self._rng is None:
            seed = self.params.seed
            self._rng = random.Random(None if seed is None else str(seed + self.index))
        return self._rng.random()

    def accept(self, token_id: int) -> SequenceOutput:
        """Take the next token; the output says whether it was the last."""
        self.output.append(token_id)
        self.tokens.append(token_id)
        self.history.accept(token_id)
        news = self.news([token_id])
        if token_id in self.stop_ids:
            news.finish_reason, news.stop_token_id = FinishReason.STOP, token_id
        elif len(self.output) >= self.params.max_tokens:
            news.finish_reason = FinishReason.LENGTH
        return news

    def news(self, new_token_ids: list[int], finish_reason: FinishReason | None = None) -> SequenceOutput:
        """An output; the first one says what a kept prefix saved, and brings the prompt's logprobs if they are due."""
        output = SequenceOutput(self.request.request_id, self.index, new_token_ids, len(self.output), finish_reason)
        if len(self.output) == len(new_token_ids):
            output.num_cached_tokens = self.num_reused
            if self.num_todo <= 1:
                output.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return output
