"""One choice of a request while vLLM computes it, and what its outputs mean in our words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.engine.backends.vllm.logprobs import token_logprobs
from server.engine.messages import FinishReason, Generate, SequenceOutput, TokenLogprobs

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
FAILED = "vLLM could not compute this answer."


@dataclass(eq=False, slots=True)
class Sequence:
    """Stands where vLLM would put a collector of its own: it calls `put` with every output, in its event loop."""

    request: Generate
    index: int
    deadline: float | None  # time.monotonic()
    receive: Callable[["Sequence", "RequestOutput | Exception"], None]
    vllm_id: str = ""  # the name vLLM gave it
    num_tokens: int = 0
    has_started: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.index

    def put(self, output: Any) -> None:
        self.receive(self, output)

    def news(self, output: "RequestOutput") -> SequenceOutput:
        """What one step of vLLM's brought this sequence."""
        params, completion = self.request.params, output.outputs[0]
        token_ids = list(completion.token_ids) if params.max_tokens else []  # vLLM computes at least one
        self.num_tokens += len(token_ids)
        news = SequenceOutput(*self.key, token_ids, self.num_tokens)
        if not self.has_started:
            self.has_started = True
            news.num_cached_tokens = output.num_cached_tokens or 0
            news.prompt_logprobs = self._prompt_logprobs(output)
        if token_ids and (params.logprobs is not None or params.logprob_token_ids):
            flat: Any = completion.logprobs
            news.logprobs = token_logprobs(flat, params.logprobs or 0, params.logprob_token_ids)
        if completion.finish_reason is not None:
            self._finish(news, completion.finish_reason, completion.stop_reason)
        return news

    def end(self, reason: FinishReason, error: str | None = None) -> SequenceOutput:
        """The last output of a sequence that vLLM did not end."""
        return SequenceOutput(*self.key, [], self.num_tokens, reason, error=error)

    def _prompt_logprobs(self, output: "RequestOutput") -> list[TokenLogprobs | None] | None:
        count = self.request.params.prompt_logprobs
        if count is None or self.index != 0:
            return None
        flat: Any = output.prompt_logprobs
        return [None, *token_logprobs(flat, count)]

    def _finish(self, news: SequenceOutput, reason: str, stop_reason: int | str | None) -> None:
        if not self.request.params.max_tokens:
            news.finish_reason = FinishReason.LENGTH
        elif reason in REASONS:
            news.finish_reason = REASONS[reason]
        else:
            news.finish_reason, news.error = FinishReason.ERROR, FAILED
        if news.finish_reason is FinishReason.STOP:
            news.stop_token_id = stop_reason if isinstance(stop_reason, int) else news.new_token_ids[-1]
