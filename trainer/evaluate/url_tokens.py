"""Token ids of prompts for a server: by a tokenizer at hand, else by its own /tokenize; else there are none."""

from collections.abc import Sequence
from typing import Any

from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.evaluate.candidate import ItemFailed, Prompt
from trainer.evaluate.prompt_ids import PromptIds, continuation_start, last_line
from trainer.evaluate.url_client import UrlClient

_PROBE = "qloopturnend"


class UrlTokens:
    """All methods give None where ids cannot be had, and raise ItemFailed for a prompt that cannot be encoded."""

    def __init__(self, client: UrlClient, model: str, local: PromptIds | None) -> None:
        self._client = client
        self._model = model
        self._local = local
        self._plain: dict[str, list[int] | None] = {}
        self._turn_end: int | None = None

    async def single(self, prompt: Prompt, continuations: Sequence[str]) -> list[int] | None:
        """The token of each continuation, where each is just one."""
        before = last_line(prompt.text) if prompt.is_plain else ""
        head = await self._of_text(before)
        found = [await self._of_text(before + continuation) for continuation in continuations]
        if head is None or any(ids is None or ids[:-1] != head for ids in found):
            return None
        return [ids[-1] for ids in found if ids]

    async def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], int] | None:
        """The ids of both, and where the continuation's begin, as in `PromptIds.pair`."""
        if self._local is not None:
            return self._encoded(prompt, continuation)
        if prompt.is_plain:
            whole = await self._tokenize({"prompt": prompt.text + continuation})
            head = await self._tokenize({"prompt": prompt.text})
        else:
            head = await self._tokenize({"messages": _plain(prompt)})
            tail = await self._of_text(continuation)
            whole = None if head is None or tail is None else [*head, *tail]
        return None if whole is None or head is None else (whole, continuation_start(head, whole))

    async def scored(self, prompt: Prompt, reference: str) -> tuple[list[int], int, int] | None:
        """The ids of prompt and reference, and where what counts begins and ends, as in `PromptIds.scored`."""
        if self._local is not None:
            try:
                return self._local.scored(prompt, reference)
            except (TextError, TemplateError) as error:
                raise ItemFailed(f"encoding: {error}") from None
        if prompt.is_plain:
            pair = await self.pair(prompt, reference)
            return None if pair is None else (*pair, len(pair[0]))
        head = await self._tokenize({"messages": _plain(prompt)})
        answered = [*_plain(prompt), {"role": "assistant", "content": reference}]
        whole = await self._tokenize({"messages": answered, "add_generation_prompt": False})
        end = await self._find_turn_end()
        if head is None or whole is None or end is None:
            return None
        if whole[: len(head)] != head or end not in whole[len(head) :]:
            raise ItemFailed("encoding: in the server's template the answer does not stand behind the prompt")
        return whole, len(head), whole.index(end, len(head)) + 1

    def _encoded(self, prompt: Prompt, continuation: str) -> tuple[list[int], int]:
        assert self._local is not None
        try:
            return self._local.pair(prompt, self._local.prompt(prompt), continuation)
        except (TextError, TemplateError) as error:
            raise ItemFailed(f"encoding: {error}") from None

    async def _find_turn_end(self) -> int | None:
        """The token that the template writes after an answer."""
        if self._turn_end is None:
            asked = [{"role": "user", "content": "a"}]
            head = await self._tokenize({"messages": asked})
            probe = await self._of_text(_PROBE)
            answered = [*asked, {"role": "assistant", "content": _PROBE}]
            whole = await self._tokenize({"messages": answered, "add_generation_prompt": False})
            known = [*(head or []), *(probe or [])]
            if head and probe and whole and whole[: len(known)] == known and len(whole) > len(known):
                self._turn_end = whole[len(known)]
        return self._turn_end

    async def _of_text(self, text: str) -> list[int] | None:
        """Of a piece of text, with nothing put before it; few different ones are asked for."""
        if not text:
            return []
        if self._local is not None:
            return self._local.plain(text)
        if text not in self._plain:
            self._plain[text] = await self._tokenize({"prompt": text, "add_special_tokens": False})
        return self._plain[text]

    async def _tokenize(self, body: dict[str, Any]) -> list[int] | None:
        return await self._client.tokenize({"model": self._model, **body})


def _plain(prompt: Prompt) -> list[dict[str, str]]:
    return [dict(message) for message in prompt.messages]
