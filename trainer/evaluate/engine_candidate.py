"""A candidate that is an engine: its own child process, asked with token ids. What is evaluated is what is served."""

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from server.engine.client import EngineClient, Generation
from server.engine.messages import FinishReason, Generate, ModelInfo, SamplingParams, SequenceOutput, TokenLogprobs
from server.errors import ClientError, DeadlineExceeded, Draining, EngineUnavailable, InternalError, Overloaded
from server.store.home import Home
from server.store.model_folder import num_weights
from server.text.detokenize import Detokenizer
from server.text.identity import text_identity
from server.text.render import ChatRenderer
from server.text.sampling_defaults import sampling_defaults
from server.text.stop import StopStrings
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.child_engine import Trial, adapter_id, child_engine, find_trial, last_words
from trainer.errors import NotServable
from trainer.evaluate.candidate import (
    Answer,
    AnswerLimits,
    Candidate,
    CandidateLost,
    ItemFailed,
    Loglikelihood,
    Logprobs,
    Prompt,
)
from trainer.evaluate.fingerprint import fingerprint
from trainer.evaluate.prompt_ids import PromptIds, shared_start
from trainer.evaluate.results import CandidateInfo

T = TypeVar("T")
MAX_IN_FLIGHT = 64
MAX_WAIT_S = 300.0  # for a place in the engine's queue
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class EngineCandidate(Candidate):
    def __init__(self, client: EngineClient, trial: Trial, name: str) -> None:
        """`client` is connected and ready; `name` is what the user called the candidate."""
        assert client.model is not None
        self._client = client
        self._trial = trial
        self._model: ModelInfo = client.model
        try:
            self._adapter = adapter_id(client, trial)
        except NotServable as error:
            raise NotServable(f"{name}: {error}") from None
        self._renderer = ChatRenderer.load(trial.model)
        self._ids = PromptIds(self._renderer)
        self._counter = itertools.count(1)
        turn_end = self._renderer.turn_end_id
        self._stops = () if turn_end is None else (turn_end,)  # beside the model's own, as the server does
        self._sampling = _sampling(trial.model, self._model)
        self.has_template = self._renderer.template is not None
        self.max_in_flight = min(self._model.max_num_seqs, MAX_IN_FLIGHT)
        self.info = replace(_info(name, trial, self._model, self._adapter), sampling=self._sampling)

    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        prompt_ids = self._prompt_ids(prompt)
        room = self._model.max_model_len - len(prompt_ids)
        params = SamplingParams(
            max_tokens=max(min(limits.max_tokens, room), 1),
            temperature=limits.temperature,
            seed=limits.seed if limits.temperature else None,
            stop_token_ids=self._stops,
            **self._sampling,
        )
        begin = time.perf_counter()
        detokenizer = Detokenizer(self._renderer.tokenizer)
        stops = StopStrings(limits.stop) if limits.stop else None
        text, count, reason = "", 0, "length"
        async with aclosing(self._outputs(prompt_ids, params)) as outputs:
            async for output in outputs:
                ids = output.new_token_ids
                if output.finish_reason is FinishReason.STOP:
                    ids, count = ids[:-1], count + 1
                for token in ids:
                    piece = detokenizer.add(token)
                    count += 1
                    text += piece if stops is None else stops.feed(piece)
                    if stops is not None and stops.matched is not None:
                        return Answer(text, "stop", len(prompt_ids), count, time.perf_counter() - begin)
                if output.finish_reason is not None:
                    reason = _FINISH.get(output.finish_reason, reason)
        text += "" if stops is None else stops.flush()
        return Answer(text, reason, len(prompt_ids), count, time.perf_counter() - begin)

    async def _next_logprobs(self, prompt: Prompt, continuations: Sequence[str]) -> Logprobs:
        prompt_ids = self._prompt_ids(prompt)
        pairs = self._encoded(lambda: [self._ids.pair(prompt, prompt_ids, each) for each in continuations])
        if all(ids[:-1] == prompt_ids for ids, _ in pairs):
            letters = tuple(ids[-1] for ids, _ in pairs)
            return Logprobs(await self._letters(prompt_ids, letters), len(prompt_ids))
        start = shared_start(pairs)
        sums = [await self._sum(ids, start) for ids, _ in pairs]
        return Logprobs(tuple(sums), len(prompt_ids))

    async def _letters(self, prompt_ids: list[int], letters: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probabilities of single tokens, all by one request, which can use a kept prefix."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=letters)
        async with aclosing(self._outputs(prompt_ids, params)) as outputs:
            async for output in outputs:
                for entry in output.logprobs or ():
                    return tuple(entry.given_logprobs)
        raise ItemFailed("the engine gave no log-probabilities")

    async def _loglikelihood(self, prompt: Prompt, reference: str) -> Loglikelihood:
        ids, start, end = self._encoded(lambda: self._ids.scored(prompt, reference))
        return Loglikelihood(await self._sum(ids[:end], start), end - start, start)

    async def _sum(self, ids: list[int], start: int) -> float:
        """Log-probability of `ids[start:]` after the rest."""
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        async with aclosing(self._outputs(ids, params)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs is not None:
                    return _summed(output.prompt_logprobs[start:])
        raise ItemFailed("the engine gave no log-probabilities of the prompt")

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self._encoded(lambda: self._ids.prompt(prompt))

    @staticmethod
    def _encoded(encode: Callable[[], T]) -> T:
        try:
            return encode()
        except (TextError, TemplateError) as error:
            raise ItemFailed(str(error)) from None

    async def _outputs(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[SequenceOutput]:
        """Everything that comes for one request; a full queue is waited for."""
        try:
            generation = await self._accepted(prompt_ids, params)
            try:
                while not generation.is_finished:
                    for output in await generation.next():
                        yield output
            finally:
                generation.cancel()
        except (ClientError, InternalError, DeadlineExceeded) as error:
            raise ItemFailed(f"{error.code}: {error.message}") from None
        except (EngineUnavailable, Draining) as error:
            raise CandidateLost(
                f"{self.info.name}: the engine went away ({error.message} Its log ends: {last_words(self._trial)})"
            ) from None

    async def _accepted(self, prompt_ids: list[int], params: SamplingParams) -> Generation:
        deadline = time.monotonic() + MAX_WAIT_S
        while True:
            request = Generate(
                request_id=f"eval-{next(self._counter)}",
                prompt_token_ids=prompt_ids,
                params=params,
                adapter=self._adapter,
            )
            try:
                return await self._client.generate(request)
            except Overloaded as error:
                if time.monotonic() > deadline:
                    raise CandidateLost(f"{self.info.name}: the engine's queue stays full: {error.message}") from None
                await asyncio.sleep(error.retry_after_s or 1)


@contextlib.asynccontextmanager
async def engine_candidate(
    name: str, home: Home, settings: Mapping[str, Any] | None = None, *, base: str | None = None
) -> AsyncIterator[EngineCandidate]:
    """`name` and `base` as `trainer.child_engine.find_trial` understands them; `settings`: the server's, by field."""
    with tempfile.TemporaryDirectory(prefix="qloop-") as folder:
        trial = find_trial(name, home, Path(folder), base)
        async with child_engine(trial, Path(folder) / "s", settings) as client:
            yield EngineCandidate(client, trial, name)


def _sampling(folder: Path, model: ModelInfo) -> dict[str, Any]:
    """What the server takes of the model's own defaults; the temperature is the evaluation's."""
    found = sampling_defaults(folder)
    chosen: dict[str, float] = {"top_k": max(int(found.get("top_k", 0)), 0)}
    chosen |= {name: float(found[name]) for name in ("top_p", "min_p", "repetition_penalty") if name in found}
    return {name: value for name, value in chosen.items() if name not in model.unsupported_params}


def _summed(entries: Sequence[TokenLogprobs | None]) -> float:
    return sum(entry.logprob for entry in entries if entry is not None)


def _info(name: str, trial: Trial, model: ModelInfo, adapter: str | None) -> CandidateInfo:
    revision = adapter.partition("@")[2] if adapter else ""
    engine = f"{model.backend} {model.dtype}"
    return CandidateInfo(
        name=name,
        kind="engine",
        model=model.name,
        adapter=f"{Path(name).name.partition('@')[0]}@{revision}" if revision else "",
        engine=engine,
        fingerprint=fingerprint(model.weights_hash, revision, engine, text_identity(trial.model)),
        num_parameters=num_weights(trial.model),
    )
