"""JSON over HTTP to a server that speaks OpenAI's API, patiently: it may be busy, or be restarted meanwhile."""

import asyncio
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import openai

from trainer.evaluate.candidate import CandidateLost, ItemFailed

PATIENCE_S = 60.0  # a server that was restarted is back by then
FIRST_PATIENCE_S = 5.0  # one that has never answered is perhaps not there at all
LONGEST_PAUSE_S = 15.0
FIRST_PAUSE_S = 0.25
TIMEOUT_S = 600.0
_TRANSIENT = frozenset((408, 409, 429, 500, 502, 503, 504))
_DENIED = frozenset((401, 403))
_NO_ROUTE = frozenset((404, 405, 501))


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
        # A server without keys wants none, but the SDK does not start without one.
        self._sdk = openai.AsyncOpenAI(base_url=url, api_key=api_key or "none", max_retries=0, timeout=TIMEOUT_S)

    async def close(self) -> None:
        await self._sdk.close()

    async def get(self, path: str) -> Any:
        """Raises as `post`."""
        return await self._call(lambda: self._sdk.get(path, cast_to=object))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON. A busy or absent server is asked again, as it asks for or with growing pauses.

        Raises ItemFailed when it refuses this request (NoSuchRoute: any such request), and CandidateLost when it stays
        away or refuses the key.
        """
        return await self._call(lambda: self._sdk.post(path, cast_to=object, body=dict(body)))

    async def tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """vLLM's /tokenize, which stands beside /v1; None where the server has none."""
        try:
            found = await self.post(f"{self._root}/tokenize", body)
            return [int(token) for token in found["tokens"]]
        except (NoSuchRoute, KeyError, TypeError, ValueError):
            return None

    async def _call(self, send: Any) -> Any:
        clock = asyncio.get_running_loop().time
        failed_at, pause = math.inf, FIRST_PAUSE_S
        while True:
            try:
                found = _parsed(await send())
                self._has_answered = True
                return found
            except openai.APIStatusError as error:
                self._has_answered = True
                if error.status_code not in _TRANSIENT:
                    raise self._refusal(error) from None
                reason, wait = _why(error), _retry_after(error) or pause
            except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
                reason, wait = _why(error), pause
            failed_at = min(failed_at, clock())
            patience_s = self._patience_s if self._has_answered else min(self._patience_s, FIRST_PATIENCE_S)
            if clock() + wait > failed_at + patience_s:
                ask = "" if self._has_answered else "; is the server running?"
                raise CandidateLost(f"{self._name}: no answer for {patience_s:g} s ({reason}){ask}")
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # not all at once
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        if error.status_code in _DENIED:
            return CandidateLost(f"{self._name}: refused ({_why(error)}); set OPENAI_API_KEY")
        kind = NoSuchRoute if error.status_code in _NO_ROUTE else ItemFailed
        return kind(f"http-{error.status_code}: {_why(error)}")


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


def _why(error: openai.APIError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    text = str(body.get("message") or error.message or type(error).__name__)
    return " ".join(text.split())[:200]
