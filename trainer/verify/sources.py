"""Whoever goes on with a text greedily, over any stop token: an engine's client, or a server's URL."""

import asyncio
import itertools
from collections.abc import Sequence

from server.engine.client import EngineClient
from server.engine.messages import Generate, SamplingParams
from server.text.render import ChatRenderer
from trainer.verify.parity import Reference
from trainer.verify.target import Server


class EngineSource:
    """Token ids in, token ids out. `adapter` is the engine's name of it."""

    def __init__(self, client: EngineClient, adapter: str) -> None:
        self._client = client
        self._adapter = adapter
        self._counter = itertools.count(1)

    def label(self, token_id: int) -> str:
        return str(token_id)

    async def go_on(self, prompt_ids: Sequence[int], count: int) -> list[str]:
        """Raises QloopError."""
        request = Generate(
            request_id=f"verify-{next(self._counter)}",
            prompt_token_ids=list(prompt_ids),
            params=SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True),
            adapter=self._adapter,
        )
        generation = await self._client.generate(request)
        found: list[str] = []
        try:
            while not generation.is_finished:
                for output in await generation.next():
                    found += map(self.label, output.new_token_ids)
        finally:
            generation.cancel()
        return found


class ServerSource:
    """Over HTTP a token's text comes back instead of its id; `choices` gives the ids of whole answers besides."""

    def __init__(self, server: Server, model: str, renderer: ChatRenderer) -> None:
        self._server = server
        self._model = model
        self._tokenizer = renderer.tokenizer

    def label(self, token_id: int) -> str:
        """Padding rows of the embedding have no text."""
        try:
            return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        except ValueError:
            return ""

    async def go_on(self, prompt_ids: Sequence[int], count: int) -> list[str]:
        """Raises ConfigError."""
        answer = await asyncio.to_thread(
            self._server.post,
            "/v1/completions",
            {
                "model": self._model,
                "prompt": list(prompt_ids),
                "max_tokens": count,
                "temperature": 0,
                "ignore_eos": True,
                "repetition_penalty": 1.0,
                "logprobs": 0,
            },
        )
        return [str(token) for token in answer["choices"][0]["logprobs"]["tokens"]]

    async def choices(self, reference: Reference) -> list[int]:
        """Its most likely token at each place of the reference's answer, by the prompt's log-probabilities."""
        answer = await asyncio.to_thread(
            self._server.post,
            "/v1/completions",
            {
                "model": self._model,
                "prompt": [*reference.prompt_ids, *reference.token_ids],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 1,
            },
        )
        entries = answer["choices"][0]["prompt_logprobs"][len(reference.prompt_ids) :]
        return [int(next(token for token, facts in entry.items() if facts["rank"] == 1)) for entry in entries]
