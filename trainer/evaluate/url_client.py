"""JSON over HTTP to a server that speaks OpenAI's API, patiently: it may be busy, or be restarted meanwhile."""

import asyncio
import contextlib
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import openai

from trainer.evaluate.candidate import CandidateLost, ItemFailed

PATIENCE_S = 60.0  # a server that was restarted is back by then
FIRST_PATIENCE_S = 5.0  # one that has never answered is perhaps not there at all
LONGEST_PAUSE_S = 15.0
FIRST_PAUSE_S = 0.25
TIMEOUT_S = 600.0
_TRANSIENT = frozenset((408, 409, 429, 500, 502, 503, 504))
_BUSY = frozenset((429, 503))
_NO_ROUTE = frozenset((404, 405, 501))
Send = Callable[[], Awaitable[object]]


class NoSuchRoute(ItemFailed):
    """The server does not have what was asked for."""


class UrlClient:
    """One server. `name` is how the user called it. Belongs to one event loop; `close` it."""

    def __init__(self, name: str, url: str, api_key: str | None, patience_s: float = PATIENCE_S) -> None:
        """`url` ends in /v1, or where else the server's /chat/completions is."""
        self._name = name
        self._root = url.removesuffix("/v1")
        self._patience_s = patience_s
        self._has_answered = False
        self._answered_at = -math.inf  # by the model, on the event loop's clock
        self._answered: Send | None = None  # the last request that it answered
        self._answered_shapes: set[tuple[str, ...]] = set()  # path and fields
        # A server without keys wants none, but the SDK does not start without one.
        self._sdk = openai.AsyncOpenAI(base_url=url, api_key=api_key or "none", max_retries=0, timeout=TIMEOUT_S)

    async def close(self) -> None:
        await self._sdk.close()

    async def get(self, path: str) -> Any:
        """Raises as `post`."""
        return await self._call(lambda: self._sdk.get(path, cast_to=object), (path,))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON. A busy or absent server is asked again, as it asks for or with growing pauses.

        Raises ItemFailed when it refuses this request (NoSuchRoute: any such request) or fails at it while it answers
        others, and CandidateLost when it stays away, refuses the key or has lost the model.
        """
        send = self._posting(path, body)
        found = await self._call(send, (path, *sorted(body)))
        self._answered_at = asyncio.get_running_loop().time()
        self._answered = send
        return found

    async def tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """vLLM's /tokenize, which stands beside /v1 and needs no engine; None where the server has none."""
        path = f"{self._root}/tokenize"
        try:
            found = await self._call(self._posting(path, body), (path, *sorted(body)))
            return [int(token) for token in found["tokens"]]
        except (NoSuchRoute, KeyError, TypeError, ValueError):
            return None

    def _posting(self, path: str, body: Mapping[str, Any]) -> Send:
        return lambda: self._sdk.post(path, cast_to=object, body=dict(body))

    async def _call(self, send: Send, shape: tuple[str, ...]) -> Any:
        clock = asyncio.get_running_loop().time
        failed_at, pause = math.inf, FIRST_PAUSE_S
        while True:
            tried_at = clock()
            try:
                found = _parsed(await send())
                self._has_answered = True
                self._answered_shapes.add(shape)
                return found
            except openai.APIStatusError as error:
                self._has_answered = True
                if error.status_code not in _TRANSIENT:
                    raise self._refusal(error, shape) from None
                reason, wait = _reason(error), _retry_after(error) or pause
                if error.status_code in _BUSY:  # with others: patience is for a server that answers nobody
                    failed_at = max(failed_at, self._answered_at)
            except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
                reason, wait = _reason(error), pause
            failed_at = min(failed_at, clock())
            if clock() + wait > failed_at + self._patience():
                raise await self._given_up(reason, tried_at)
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # not all at once
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _patience(self) -> float:
        return self._patience_s if self._has_answered else min(self._patience_s, FIRST_PATIENCE_S)

    async def _given_up(self, reason: str, tried_at: float) -> Exception:
        """Whose fault it is: the item's, where the server has answered another request since `tried_at`, or does so
        now."""
        if self._answered_at <= tried_at:
            await self._ask_once_more()
        if self._answered_at > tried_at:
            return ItemFailed(reason)
        ask = "" if self._has_answered else "; is the server running?"
        return CandidateLost(f"{self._name}: no answer for {self._patience():g} s ({reason}){ask}")

    async def _ask_once_more(self) -> None:
        """What it could answer before: so that one item alone that it fails at is told from a server that fails."""
        if self._answered is None:
            return
        with contextlib.suppress(openai.APIError, ItemFailed, TimeoutError):
            async with asyncio.timeout(self._patience_s):
                _parsed(await self._answered())
            self._answered_at = asyncio.get_running_loop().time()

    def _refusal(self, error: openai.APIStatusError, shape: tuple[str, ...]) -> Exception:
        """Before anything was answered a 403 is of the key; later it is a firewall's, which dislikes the item's text.
        A 404 to what was answered before is no missing route."""
        status = error.status_code
        if status == 401 or (status == 403 and self._answered is None):
            return CandidateLost(f"{self._name}: refused ({_why(error)}); set OPENAI_API_KEY")
        if status == 404 and shape in self._answered_shapes:
            return CandidateLost(f"{self._name}: the server does not have the model any more ({_why(error)})")
        kind = NoSuchRoute if status in _NO_ROUTE else ItemFailed
        return kind(_reason(error))


def _parsed(found: Any) -> Any:
    """A server that forgets the Content-Type has its JSON handed over as text."""
    try:
        return json.loads(found) if isinstance(found, str) else found
    except ValueError:
        raise ItemFailed("answer: the reply is no JSON") from None


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds; RFC 9110 allows a date, too, which no such server sends."""
    try:
        return min(float(error.response.headers["retry-after"]), LONGEST_PAUSE_S)
    except (KeyError, ValueError):
        return None


def _reason(error: openai.APIError) -> str:
    """Code and text, as an item's record has them."""
    if isinstance(error, openai.APIStatusError):
        return f"http-{error.status_code}: {_why(error)}"
    if isinstance(error, openai.APITimeoutError):
        return f"timeout: {_why(error)}"
    return f"{'connection' if isinstance(error, openai.APIConnectionError) else 'answer'}: {_why(error)}"


def _why(error: openai.APIError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    text = str(body.get("message") or error.message or type(error).__name__)
    return " ".join(text.split())[:200]
