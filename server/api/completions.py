"""`POST /v1/completions` (OpenAI API reference, "Create completion"): raw prompts, as text or token ids."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.answer import Answer, new_id
from server.api.choice import Delta
from server.api.generation import settle
from server.api.logprobs import completion_logprobs, text_of, vllm_prompt_logprobs
from server.api.parameters import choice_options, sampling_params
from server.api.parsing import parse
from server.api.protocol import CompletionRequest
from server.api.request import begin, in_thread_if_long, response_headers, treatment
from server.api.serving import Serving
from server.api.sse import EventStream, WholeAnswer, encode_json
from server.engine.messages import TokenLogprobs
from server.errors import InvalidRequest
from server.ops.metrics import AnswerTimer
from server.text.tokenizer import TextError

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 128


async def create_completion(request: Request) -> Response:
    serving, raw = await begin(request)
    body, ignored = parse(CompletionRequest, raw, is_lenient=serving.settings.unknown_params == "warn")
    ignored += settle(body)
    target = serving.resolve(body.model)
    prompts = await _prompts(body, serving)
    params = sampling_params(
        body,
        serving,
        max_tokens=_max_tokens(body),
        logprobs=body.logprobs,
        prompt_logprobs=_num_prompt_logprobs(body),
    )
    timer = AnswerTimer("completions", target.model_id)
    options, treated = choice_options(body, serving), treatment(request, body)
    answer = Answer(serving, target, prompts, params, body.n or 1, options, treated, new_id("cmpl"), timer)
    headers = response_headers(ignored)
    await answer.submit()
    writer = CompletionWriter(answer, body)
    if body.stream:
        return EventStream(answer, writer, headers)
    return WholeAnswer(answer, writer.whole, headers)


async def _prompts(body: CompletionRequest, serving: Serving) -> list[list[int]]:
    """One list of ids per prompt. Control tokens in raw text are parsed: that is what raw means."""
    given = body.prompt
    many = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not many or len(many) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' must hold 1 to {MAX_PROMPTS} prompts.", param="prompt", code="invalid_value")
    tokenizer, vocab_size = serving.text.renderer.tokenizer, serving.model.vocab_size
    prompts: list[list[int]] = []
    for prompt in many:
        if isinstance(prompt, str):
            try:
                ids = await in_thread_if_long(len(prompt), lambda text=prompt: tokenizer.encode_raw(text))  # type: ignore[misc]
            except TextError as error:
                raise InvalidRequest(str(error), param="prompt", code="invalid_value") from None
        else:
            ids = list(prompt)  # type: ignore[arg-type]
            if ids and max(ids) >= vocab_size:
                raise InvalidRequest(
                    f"'prompt' holds token {max(ids)}, but the vocabulary ends at {vocab_size - 1}.", param="prompt"
                )
        prompts.append(ids)
    return prompts


def _max_tokens(body: CompletionRequest) -> int:
    if body.max_tokens is None:
        return DEFAULT_MAX_TOKENS
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("'max_tokens' may be 0 only with 'echo': true.", param="max_tokens", code="invalid_value")
    return body.max_tokens


def _num_prompt_logprobs(body: CompletionRequest) -> int | None:
    """`echo` with `logprobs` shows the prompt's too."""
    asked = [k for k in (body.prompt_logprobs, body.logprobs if body.echo else None) if k is not None]
    return max(asked, default=None)


class CompletionWriter:
    """Builds the body, or the chunks, of one completion."""

    def __init__(self, answer: Answer, body: CompletionRequest) -> None:
        self._answer = answer
        self._body = body
        self._tokenizer = answer.serving.text.renderer.tokenizer
        self._common = {
            "id": answer.id,
            "object": "text_completion",
            "created": answer.created,
            "model": answer.target.model_id,
            "system_fingerprint": answer.serving.fingerprint(answer.target),
        }
        self._offsets = [0] * len(answer.choices)
        self._waiting: list[Delta] = []
        self._begun: set[int] = set()  # choices that have shown something
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by prompt: all its choices share them
        self._head = b"data: " + encode_json(self._common)[:-1] + b',"choices":['

    async def whole(self) -> dict[str, Any]:
        collected = await self._answer.complete()
        for deltas in collected:
            self._keep_prompt_logprobs(deltas)
        choices = [self._whole_choice(index, deltas) for index, deltas in enumerate(collected)]
        return {**self._common, "choices": choices, "usage": self._answer.usage.as_dict()}

    def begin(self) -> bytes:
        """The prompts, with `echo`; with their logprobs they come later, as part of the first delta."""
        if not self._body.echo or self._echoes_logprobs:
            return b""
        return b"".join(self._chunk(i, self._prompt_text(i), None, None, None) for i in range(len(self._offsets)))

    def news(self, deltas: list[Delta]) -> bytes:
        self._keep_prompt_logprobs(deltas)
        waiting = self._waiting + deltas
        self._waiting = [delta for delta in waiting if not self._can_show(delta)]
        return b"".join([self._delta_chunk(delta) for delta in waiting if self._can_show(delta)])

    def end(self) -> bytes:
        if not self._body.wants_usage:
            return b""
        return self._head + b'],"usage":' + encode_json(self._answer.usage.as_dict()) + b"}\n\n"

    def _whole_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        merged = Delta(index, "".join(delta.text for delta in deltas))
        if self._body.logprobs is not None:
            merged.logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        choice = {
            "index": index,
            "text": (self._prompt_text(index) if self._body.echo else "") + merged.text,
            "logprobs": self._logprobs(merged, is_first=True),
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            entries = self._prompt_logprobs.get(index // self._answer.n)
            choice["prompt_logprobs"] = vllm_prompt_logprobs(entries, self._tokenizer)
        return choice

    def _keep_prompt_logprobs(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.prompt_logprobs is not None:
                self._prompt_logprobs[delta.index // self._answer.n] = delta.prompt_logprobs

    @property
    def _echoes_logprobs(self) -> bool:
        return bool(self._body.echo) and self._body.logprobs is not None

    def _can_show(self, delta: Delta) -> bool:
        """The prompt's logprobs come with its first choice; the others wait for them."""
        return not self._echoes_logprobs or delta.index // self._answer.n in self._prompt_logprobs

    def _delta_chunk(self, delta: Delta) -> bytes:
        text, is_first = delta.text, delta.index not in self._begun
        if is_first and self._echoes_logprobs:
            text = self._prompt_text(delta.index) + text
        if not text and not delta.logprobs and delta.finish_reason is None:
            return b""
        self._begun.add(delta.index)
        logprobs = self._logprobs(delta, is_first=is_first)
        return self._chunk(delta.index, text, logprobs, delta.finish_reason, delta.stop_reason)

    def _chunk(self, index: int, text: str, logprobs: Any, finish: str | None, stop_reason: str | int | None) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": stop_reason,
        }
        tail = b"}\n\n"
        if self._body.wants_continuous_usage:
            tail = b',"usage":' + encode_json(self._answer.usage.as_dict()) + tail
        elif self._body.wants_usage:
            tail = b',"usage":null' + tail
        return self._head + encode_json(choice) + b"]" + tail

    def _logprobs(self, delta: Delta, *, is_first: bool) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        entries: list[TokenLogprobs | None] = list(delta.logprobs or ())
        ids = [entry.token_id for entry in delta.logprobs or ()]
        if is_first and self._echoes_logprobs:
            entries = [*self._prompt_logprobs.get(delta.index // self._answer.n, ()), *entries]
            ids = [*self._prompt(delta.index), *ids]
        num_top = max(self._body.logprobs, len(self._body.logprob_token_ids or ()))
        shape = completion_logprobs(entries, ids, num_top, self._tokenizer, self._offsets[delta.index])
        self._offsets[delta.index] += sum(map(len, shape["tokens"]))
        return shape

    def _prompt(self, index: int) -> list[int]:
        return self._answer.prompts[index // self._answer.n]

    def _prompt_text(self, index: int) -> str:
        return text_of(self._prompt(index), self._tokenizer)
