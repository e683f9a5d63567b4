"""One API call's generation, from admission to the last token: shared by chat and text completions.

Knows prompts as token ids and choices as text; nothing about how a response body looks.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.choice import Choice, ChoiceOptions, Delta
from server.api.serving import Serving, Target
from server.engine.client import Generation
from server.engine.messages import Generate, SamplingParams, SequenceOutput
from server.errors import InvalidRequest, ModelNotFound, QloopError
from server.ops.metrics import AnswerTimer


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None  # of the prompts; None where the engine does not say

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return usage


@dataclass(frozen=True)
class Treatment:
    """How the engine is to treat a request; fields as in `Generate`."""

    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""


class ClientGone(QloopError):
    """The caller closed the connection; nobody reads the answer. 499 is nginx's word for it, in logs only."""

    status = 499


@dataclass
class Answer:
    """n choices for each prompt; choice index = prompt index * n + choice, as in OpenAI's API."""

    serving: Serving
    target: Target
    prompts: Sequence[list[int]]
    params: SamplingParams
    n: int
    options: ChoiceOptions
    treatment: Treatment
    id: str
    timer: AnswerTimer
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        tokenizer = self.serving.text.renderer.tokenizer
        self.choices = [Choice(i, tokenizer, self.options) for i in range(len(self.prompts) * self.n)]
        self._prompt_tokens = sum(map(len, self.prompts))
        self._generations: list[Generation] = []
        self._num_unfinished = len(self.choices)
        self._cached_tokens: dict[int, int] = {}  # by prompt

    @property
    def usage(self) -> Usage:
        cached = sum(self._cached_tokens.values()) if self._cached_tokens else None
        return Usage(self._prompt_tokens, sum(choice.num_tokens for choice in self.choices), cached)

    async def submit(self) -> None:
        """Returns when the engine has admitted every prompt. Raises the QloopError that refused one."""
        try:
            await self._submit_all()
        except ModelNotFound:
            # Between looking a name up and asking the engine it may have been promoted, and the old revision unloaded.
            target = self.serving.resolve(self.target.model_id)
            if self._generations or target.adapter_id == self.target.adapter_id:
                raise
            self.target = target
            await self._submit_all()

    async def _submit_all(self) -> None:
        try:
            for number, prompt in enumerate(self.prompts):
                self._check_length(prompt)
                request_id = self.id if number == 0 else f"{self.id}-{number}"
                request = Generate(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    params=self.params,
                    n=self.n,
                    adapter=self.target.adapter_id,
                    priority=self.treatment.priority,
                    deadline_s=self.treatment.deadline_s,
                    cache_salt=self.treatment.cache_salt,
                )
                self._generations.append(await self.serving.client.generate(request))
        except BaseException:
            self.cancel()
            raise

    def _check_length(self, prompt: list[int]) -> None:
        limit, asked = self.serving.model.max_model_len, self.params.max_tokens
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="prompt", code="invalid_value")
        if len(prompt) + asked > limit:
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + asked} tokens ({len(prompt)} in the prompt, {asked} in the completion). "
                "Please reduce the length of the prompt or of the completion.",
                param="max_tokens" if len(prompt) < limit else "prompt",
                code="context_length_exceeded",
            )

    def cancel(self) -> None:
        """Free everything in the engine. Harmless when finished; always called in the end."""
        for generation in self._generations:
            generation.cancel()

    def client_gone(self) -> None:
        for generation in self._generations:
            generation.fail(ClientGone("The client closed the connection."))

    @property
    def is_finished(self) -> bool:
        """Every choice has had its last delta."""
        return self._num_unfinished == 0

    def on_news(self, call: Callable[[], None]) -> None:
        """`call` at every output and at the end, from now on; it must neither wait nor raise."""
        for generation in self._generations:
            generation.on_news = call

    def take_deltas(self) -> list[Delta]:
        """What has come since the last call, often nothing. Raises the QloopError that ended the request early."""
        deltas: list[Delta] = []
        for number, generation in enumerate(self._generations):
            try:
                outputs = generation.take()
            except QloopError:
                if not deltas:
                    raise
                generation.call_again()  # first what the others brought
                break
            if outputs:
                self._digest(number, outputs, deltas)
        return deltas

    async def complete(self) -> list[list[Delta]]:
        """All deltas of each choice."""
        collected: list[list[Delta]] = [[] for _ in self.choices]
        news = asyncio.Event()
        self.on_news(news.set)
        while True:
            for delta in self.take_deltas():
                collected[delta.index].append(delta)
            if self.is_finished:
                return collected
            await news.wait()
            news.clear()

    def _digest(self, number: int, outputs: list[SequenceOutput], deltas: list[Delta]) -> None:
        self.timer.saw_output()
        for output in outputs:
            if output.num_cached_tokens is not None:
                # Later choices find the prompt that the first one computed: that was not saved, only not done again.
                least = self._cached_tokens.get(number, output.num_cached_tokens)
                self._cached_tokens[number] = min(least, output.num_cached_tokens)
            choice = self.choices[number * self.n + output.index]
            if choice.is_finished:
                continue  # computed between the stop string and the engine's hearing of it
            delta = choice.feed(output)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._num_unfinished -= 1
                self._generations[number].abort(output.index)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
