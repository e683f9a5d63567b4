"""A candidate behind a URL that speaks OpenAI's API. Answers need nothing else; log-probabilities need a server that
gives those of chosen tokens (this one, vLLM's chat) or of a prompt's own tokens (`echo` of /v1/completions).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from server.errors import ConfigError
from server.text.render import ChatRenderer
from trainer.evaluate.candidate import (
    Answer,
    AnswerLimits,
    Candidate,
    CandidateChanged,
    CandidateLost,
    ItemFailed,
    Loglikelihood,
    Logprobs,
    Prompt,
)
from trainer.evaluate.prompt_ids import PromptIds, shared_start
from trainer.evaluate.results import CandidateInfo
from trainer.evaluate.url_client import PATIENCE_S, UrlClient
from trainer.evaluate.url_tokens import UrlTokens

MAX_STOPS = 4  # OpenAI's
NO_LOGPROBS = (
    "{name}: log-probabilities are not to be had from this server ({why}). Take --by answer for multiple choice; "
    "likelihood tasks need a server with `echo` and `logprobs` in /v1/completions, and /tokenize or --tokenizer"
)
# Some servers must write a token, and then show at least one likely one; neither counts.
ECHOES = ({"max_tokens": 0, "logprobs": 0}, {"max_tokens": 1, "logprobs": 1})
CHANGED = (
    "{name}: serves something else since the evaluation began (system_fingerprint {before}, now {now}); of an adapter "
    "whose name may be moved take one revision, as in http://host:8000/v1#name@revision"
)
LOOKS = 8  # at a server whose fingerprint is another one
PROBE = "1, 2, 3, 4"  # several tokens, whatever the tokenizer
Place = tuple[int, float | None]  # where a token begins, and its log-probability


class UrlCandidate(Candidate):
    """One model of one server. `tokens` finds token ids."""

    def __init__(self, info: CandidateInfo, client: UrlClient, tokens: UrlTokens, concurrency: int) -> None:
        self.info = info
        self.max_in_flight = concurrency
        self._client = client
        self._tokens = tokens
        self._tried: dict[str, asyncio.Task[str]] = {}
        self._is_steady = True  # its fingerprint, as far as is known

    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        body = self._body(max_tokens=limits.max_tokens, temperature=limits.temperature)
        if limits.stop:
            body["stop"] = list(limits.stop[:MAX_STOPS])
        if limits.temperature:
            body["seed"] = limits.seed
        begin = time.perf_counter()
        found = await self._ask(prompt, body)
        choice = _choice(found)
        text = choice.get("text") if prompt.is_plain else _mapping(choice.get("message")).get("content")
        return Answer(
            str(text or ""),
            str(choice.get("finish_reason") or "stop"),
            _usage(found, "prompt_tokens"),
            _usage(found, "completion_tokens"),
            time.perf_counter() - begin,
        )

    async def _next_logprobs(self, prompt: Prompt, continuations: Sequence[str]) -> Logprobs:
        ids = await self._tokens.single(prompt, continuations)
        if ids is not None:
            probe = Prompt(text=PROBE) if prompt.is_plain else Prompt(messages=({"role": "user", "content": PROBE},))
            way = f"letters, {'plain' if prompt.is_plain else 'chat'}"
            if not await self._fault(way, lambda: self._letters(probe, continuations, ids)):
                return await self._letters(prompt, continuations, ids)
        return Logprobs(tuple(await self._continued(prompt, continuations)))

    async def _loglikelihood(self, prompt: Prompt, reference: str) -> Loglikelihood:
        found = await self._tokens.scored(prompt, reference)
        if found is None:
            raise self._lost("no token ids")
        ids, start, end = found
        if end == start:
            return Loglikelihood(0.0, 0, start)
        return Loglikelihood(await self._sum(ids[:end], start), end - start, start)

    async def _fault(self, way: str, probe: Callable[[], Awaitable[object]]) -> str:
        """Why the server cannot go this way, "" where it can. Tried once, with a prompt of ours: when it refuses a
        benchmark's prompt later, that is the item's fault."""

        async def tried() -> str:
            try:
                await probe()
            except ItemFailed as error:
                return str(error)
            return ""

        if way not in self._tried:
            self._tried[way] = asyncio.create_task(tried())
        return await self._tried[way]

    async def _letters(self, prompt: Prompt, letters: Sequence[str], ids: Sequence[int]) -> Logprobs:
        """All of them by one request, which can use a kept prefix. Told by their text: vLLM puts the token that it
        wrote before them, and moves it there where it is one of them."""
        body = self._body(max_tokens=1, logprob_token_ids=list(ids))
        body |= {"logprobs": 0} if prompt.is_plain else {"logprobs": True}
        found = await self._ask(prompt, body)
        try:
            shape = _choice(found)["logprobs"]
            if prompt.is_plain:
                by_text = shape["top_logprobs"][0]
            else:
                by_text = {entry["token"]: entry["logprob"] for entry in shape["content"][0]["top_logprobs"]}
            return Logprobs(tuple(float(by_text[letter]) for letter in letters), _usage(found, "prompt_tokens"))
        except (KeyError, IndexError, TypeError, ValueError):
            raise ItemFailed("logprobs: the reply lacks tokens that were asked for") from None

    async def _continued(self, prompt: Prompt, continuations: Sequence[str]) -> list[float]:
        pairs = [await self._tokens.pair(prompt, each) for each in continuations]
        known = [pair for pair in pairs if pair is not None]
        if len(known) == len(pairs):
            start = shared_start(known)
            return [await self._sum(ids, start) for ids, _ in known]
        if not prompt.is_plain:
            raise self._lost("no token ids")
        found = [await self._places(prompt.text + each) for each in continuations]
        start = min(_token_at(places, len(prompt.text)) for places in found)
        return [_total(places, start) for places in found]

    async def _sum(self, ids: list[int], start: int) -> float:
        """Log-probability of what begins at token `start`."""
        return _total(await self._places(ids), start)

    async def _places(self, text: list[int] | str) -> list[Place]:
        """Of every token of `text`."""
        probe: list[int] | str = PROBE if isinstance(text, str) else text[:2]
        faults = []
        for number, echo in enumerate(ECHOES):
            way = f"echo {number}, {'text' if isinstance(text, str) else 'ids'}"
            fault = await self._fault(way, lambda echo=echo: self._probed(probe, echo))  # type: ignore[misc]
            if not fault:
                return await self._echoed(text, echo)
            faults.append(fault)
        raise self._lost(faults[0])

    async def _probed(self, probe: list[int] | str, echo: Mapping[str, int]) -> float:
        return _total(await self._echoed(probe, echo), 1)

    async def _echoed(self, text: list[int] | str, echo: Mapping[str, int]) -> list[Place]:
        found = await self._post("/completions", self._body(prompt=text, echo=True, **echo))
        shape = _mapping(_choice(found).get("logprobs"))
        values = shape.get("token_logprobs") or []
        places = shape.get("text_offset") or [] if isinstance(text, str) else range(len(values))
        return [(at, value) for at, value in zip(places, values, strict=False) if at < len(text)]

    async def _ask(self, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any]:
        if prompt.is_plain:
            return await self._post("/completions", {**body, "prompt": prompt.text})
        messages = [dict(message) for message in prompt.messages]
        return await self._post("/chat/completions", {**body, "messages": messages})

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Raises CandidateChanged for the reply of other weights: one result holds figures of one candidate."""
        found = _object(await self._client.post(path, body))
        before, now = self.info.fingerprint, found.get("system_fingerprint")
        if self._is_steady and before and now and now != before:
            self._is_steady = not await self._alternates(before)
            if self._is_steady:
                raise CandidateChanged(CHANGED.format(name=self.info.name, before=before, now=now))
        return found

    async def _alternates(self, before: str) -> bool:
        """Does it say `before` again? Then its fingerprints are not of weights: several servers share this URL."""
        return any([await _fingerprint(self._client, self.info.model) == before for _ in range(LOOKS)])

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {"model": self.info.model, "temperature": 0.0, **fields}

    def _lost(self, why: str) -> CandidateLost:
        return CandidateLost(NO_LOGPROBS.format(name=self.info.name, why=why))


@contextlib.asynccontextmanager
async def url_candidate(
    name: str,
    *,
    api_key: str | None = None,
    tokenizer: Path | None = None,
    concurrency: int = 16,
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[UrlCandidate]:
    """`name` is `http://host:port/v1#model`; without a model the server's only one. `tokenizer`: a folder with the
    model's tokenizer and template. Raises ConfigError when the server has no such model, CandidateLost when it is not
    there."""
    url, _, model = name.partition("#")
    url = url.rstrip("/")
    local = None if tokenizer is None else PromptIds(ChatRenderer.load(tokenizer))
    client = UrlClient(name, url, api_key, patience_s)
    try:
        model = await _served(client, name, model)
        fingerprint = await _steady_fingerprint(client, model)
        info = CandidateInfo(name=name, kind="url", model=model, engine=url, fingerprint=fingerprint)
        yield UrlCandidate(info, client, UrlTokens(client, model, local), concurrency)
    finally:
        await client.close()


async def _served(client: UrlClient, name: str, model: str) -> str:
    """The model's id. A server that lists none is believed to have it, and one may have more than it lists: ours has
    every `name@revision` besides the names."""
    try:
        listed = [str(each["id"]) for each in _object(await client.get("/models"))["data"]]
    except (ItemFailed, KeyError, TypeError):
        listed = []
    if not model and len(listed) == 1:
        return listed[0]
    if not model or (listed and model not in listed and not await _has(client, model)):
        which = f"it serves {', '.join(listed[:20])}" if listed else "the server lists none"
        raise ConfigError(f"{name}: name one of the server's models after #, as in http://host:8000/v1#model; {which}")
    return model


async def _has(client: UrlClient, model: str) -> bool:
    try:
        return _object(await client.get(f"/models/{quote(model)}")).get("id") == model
    except ItemFailed:
        return False


async def _steady_fingerprint(client: UrlClient, model: str) -> str:
    """ "" where it says none, or another one from reply to reply, which says nothing of the weights."""
    first = await _fingerprint(client, model)
    return first if first and await _fingerprint(client, model) == first else ""


async def _fingerprint(client: UrlClient, model: str) -> str:
    """The server's own word for what it runs; "" where it says none."""
    body = {"model": model, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1, "temperature": 0.0}
    try:
        return str(_object(await client.post("/chat/completions", body)).get("system_fingerprint") or "")
    except ItemFailed:
        return ""


def _token_at(places: Sequence[Place], start: int) -> int:
    """Where the token begins that holds what stands at `start`: it may hold the end of what is before, too. The first
    of all has no value."""
    return max((at for at, _ in places[1:] if at <= start), default=start)


def _total(places: Sequence[Place], start: int) -> float:
    values = [value for at, value in places if at >= start]
    if not values or None in values:
        raise ItemFailed("logprobs: the reply holds none of the prompt's tokens")
    return float(sum(value for value in values if value is not None))


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ItemFailed("answer: the reply is no JSON object")
    return found


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _usage(found: dict[str, Any], name: str) -> int:
    """0 where the server does not say."""
    count = _mapping(found.get("usage")).get(name)
    return count if isinstance(count, int) else 0


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ItemFailed("answer: the reply holds no choice")
    return choices[0]
