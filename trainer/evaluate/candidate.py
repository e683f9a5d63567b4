"""What is evaluated, as the tasks see it: something that answers, and says how likely it finds given answers.

Knows neither tasks nor scores. The order of what is asked is kept; what goes wrong with one item is that item's error.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import TrainerError
from trainer.evaluate.results import CandidateInfo

T = TypeVar("T")
Message = Mapping[str, str]
OnDone = Callable[[int, T], None]  # place among what was asked, and what came


class CandidateLost(TrainerError):
    """The engine or the URL does not answer any more. What was answered is kept; the same command goes on with it."""


class CandidateChanged(CandidateLost):
    """The URL's name means other weights than at the start. What was answered is of those before."""


class ItemFailed(Exception):
    """One item could not be asked. The text is for its record."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user, or, where `messages` is empty, a text to be continued.

    Prompts of one `group` begin alike: one of them goes first, so that the others find its keys and values computed.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    group: str = ""

    @property
    def is_plain(self) -> bool:
        return not self.messages

    @property
    def shown(self) -> str:
        """For a reader of the report: the last turn, or the text."""
        return self.messages[-1]["content"] if self.messages else self.text


@dataclass(frozen=True)
class Answer:
    """`finish_reason` is stop, length or, with `error`, "error". `num_tokens` counts the stop token."""

    text: str = ""
    finish_reason: str = "error"
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Logprobs:
    """Of each continuation given the prompt: the sum over its tokens, in nats."""

    values: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Loglikelihood:
    """Of a reference answer with the token that ends it: `total` nats over `num_tokens` tokens, as training counts."""

    total: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class AnswerLimits:
    """How an answer is made. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Candidate(ABC):
    """`max_in_flight` requests are under way at a time. All methods belong to one event loop.

    Each list comes in the order of what was asked; `on_done` hears of every item at once. Raises CandidateLost when
    the whole candidate is gone.
    """

    info: CandidateInfo
    max_in_flight: int = 32
    has_template: bool = True

    async def answers(
        self, prompts: Sequence[Prompt], limits: AnswerLimits, on_done: OnDone[Answer] | None = None
    ) -> list[Answer]:
        async def ask(place: int) -> Answer:
            try:
                return await self._answer(prompts[place], limits)
            except ItemFailed as error:
                return Answer(error=str(error))

        return await self._all(prompts, ask, on_done)

    async def next_logprobs(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        on_done: OnDone[Logprobs] | None = None,
    ) -> list[Logprobs]:
        """`continuations[i]` are possible beginnings of the answer to `prompts[i]`."""

        async def ask(place: int) -> Logprobs:
            try:
                return await self._next_logprobs(prompts[place], continuations[place])
            except ItemFailed as error:
                return Logprobs(error=str(error))

        return await self._all(prompts, ask, on_done)

    async def loglikelihoods(
        self, prompts: Sequence[Prompt], references: Sequence[str], on_done: OnDone[Loglikelihood] | None = None
    ) -> list[Loglikelihood]:
        """How likely each reference is as the answer to its prompt, computed as training's loss is: the answer's
        tokens and the token that ends the turn count, the template's and the question's do not. Of a plain prompt the
        reference's tokens count, and all but the first where there is no text before them."""

        async def ask(place: int) -> Loglikelihood:
            try:
                return await self._loglikelihood(prompts[place], references[place])
            except ItemFailed as error:
                return Loglikelihood(error=str(error))

        return await self._all(prompts, ask, on_done)

    @abstractmethod
    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        """Raises ItemFailed or CandidateLost, as the two below."""

    @abstractmethod
    async def _next_logprobs(self, prompt: Prompt, continuations: Sequence[str]) -> Logprobs: ...

    @abstractmethod
    async def _loglikelihood(self, prompt: Prompt, reference: str) -> Loglikelihood: ...

    async def _all(
        self, prompts: Sequence[Prompt], ask: Callable[[int], Awaitable[T]], on_done: OnDone[T] | None
    ) -> list[T]:
        """Every place once, a group's first before the rest of it; at most `max_in_flight` at a time."""
        order, firsts = pilots_first([prompt.group for prompt in prompts])
        begun = {first: asyncio.Event() for first in set(firsts.values())}
        found: dict[int, T] = {}
        places = iter(order)

        async def work() -> None:
            for place in places:
                if place in firsts:
                    await begun[firsts[place]].wait()
                try:
                    found[place] = await ask(place)
                finally:
                    if place in begun:
                        begun[place].set()
                if on_done is not None:
                    on_done(place, found[place])

        await _together([work() for _ in range(min(self.max_in_flight, len(prompts)))])
        return [found[place] for place in range(len(prompts))]


def pilots_first(groups: Sequence[str]) -> tuple[list[int], dict[int, int]]:
    """The order in which to ask, and for each place that must wait the place of its group's first.

    The first of the next group goes before the rest of this one, so that nothing waits at the change.
    """
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group or f"\0{place}", []).append(place)
    firsts = {place: own[0] for own in members.values() for place in own[1:]}
    order: list[int] = []
    rest: list[int] = []
    for own in members.values():
        order += [own[0], *rest]
        rest = own[1:]
    return order + rest, firsts


async def _together(jobs: Sequence[Awaitable[None]]) -> None:
    """All of them; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
