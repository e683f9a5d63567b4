"""`POST /v1/chat/completions` (OpenAI API reference, "Create chat completion")."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.answer import Answer, new_id
from server.api.choice import Delta
from server.api.generation import settle
from server.api.logprobs import chat_logprobs, vllm_prompt_logprobs
from server.api.parameters import choice_options, sampling_params
from server.api.parsing import parse
from server.api.protocol import ROLES, ChatMessage, ChatRequest
from server.api.request import begin, in_thread_if_long, response_headers, treatment
from server.api.serving import Serving
from server.api.sse import EventStream, WholeAnswer, encode_json
from server.errors import InvalidRequest
from server.ops.metrics import AnswerTimer
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError

# `ChatRenderer.render`'s own arguments.
RESERVED_KWARGS = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message"})


async def create_chat_completion(request: Request) -> Response:
    serving, raw = await begin(request)
    body, ignored = parse(ChatRequest, raw, is_lenient=serving.settings.unknown_params == "warn")
    ignored += settle(body)
    target = serving.resolve(body.model)
    prompt = await render_chat(
        serving.text.renderer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs or {},
    )
    params = sampling_params(
        body,
        serving,
        max_tokens=_max_tokens(body, serving, len(prompt) + target.num_virtual),
        logprobs=_num_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
    )
    timer = AnswerTimer("chat", target.model_id)
    options, treated = choice_options(body, serving), treatment(request, body)
    answer = Answer(serving, target, [prompt], params, body.n or 1, options, treated, new_id("chatcmpl"), timer)
    headers = response_headers(ignored)
    await answer.submit()
    if body.stream:
        return EventStream(answer, ChatChunks(answer, body), headers)

    async def build() -> dict[str, Any]:
        return _whole(answer, body, await answer.complete())

    return WholeAnswer(answer, build, headers)


async def render_chat(
    renderer: ChatRenderer,
    messages: list[ChatMessage],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: dict[str, Any],
) -> list[int]:
    """Prompt ids. Raises InvalidRequest naming the message, or with the template's own complaint."""
    plain = [_plain_message(message, place) for place, message in enumerate(messages)]
    length = sum(len(message["content"]) for message in plain)
    reserved = RESERVED_KWARGS & template_kwargs.keys()
    if reserved:
        raise InvalidRequest(
            f"'chat_template_kwargs' may not set {sorted(reserved)[0]!r}.", param="chat_template_kwargs"
        )
    if add_generation_prompt and continue_final_message:
        add_generation_prompt = False  # OpenAI clients cannot know vLLM's rule that one excludes the other

    def render() -> list[int]:
        return renderer.render(
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )

    try:
        return await in_thread_if_long(length, render)
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages", code="invalid_messages") from None
    except TextError as error:
        raise InvalidRequest(str(error), param=error.param or "messages", code="invalid_messages") from None


def _plain_message(message: ChatMessage, place: int) -> dict[str, Any]:
    where = f"messages[{place}]"
    if message.role not in ROLES:
        raise InvalidRequest(
            f"Invalid value for '{where}.role': {message.role!r}. Accepted: {', '.join(ROLES)}.",
            param=f"{where}.role",
            code="invalid_value",
        )
    if message.tool_calls or message.role == "tool" or message.tool_call_id is not None:
        raise InvalidRequest(
            f"'{where}': this server does not support tool calls.", param=where, code="unsupported_parameter"
        )
    if message.refusal:
        raise InvalidRequest(
            f"This server cannot show '{where}.refusal' to the model; put its text into 'content'.",
            param=f"{where}.refusal",
            code="unsupported_parameter",
        )
    if message.content is None:
        raise InvalidRequest(f"'{where}.content' is required.", param=f"{where}.content", code="invalid_value")
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    # OpenAI renamed the role; templates know the old name.
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    return plain


def _max_tokens(body: ChatRequest, serving: Serving, num_taken: int) -> int:
    """`num_taken`: places of the context that hold something already."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked is None:
        return max(serving.model.max_model_len - num_taken, 1)
    if asked < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(f"{name!r} must be at least 1.", param=name, code="invalid_value")
    return asked


def _num_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs", code="invalid_value")
    return (body.top_logprobs or 0) if body.logprobs else None


def _num_top(body: ChatRequest) -> int:
    """How many tokens are shown at each position."""
    return len(body.logprob_token_ids or ()) or body.top_logprobs or 0


# --- one body ---


def _whole(answer: Answer, body: ChatRequest, collected: list[list[Delta]]) -> dict[str, Any]:
    tokenizer = answer.serving.text.renderer.tokenizer
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.target.model_id,
        "system_fingerprint": answer.serving.fingerprint(answer.target),
        "choices": [_whole_choice(answer, body, index, deltas) for index, deltas in enumerate(collected)],
        "usage": answer.usage.as_dict(),
        **_prompt_logprobs(body, collected, tokenizer),
    }


def _whole_choice(answer: Answer, body: ChatRequest, index: int, deltas: list[Delta]) -> dict[str, Any]:
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    tokenizer = answer.serving.text.renderer.tokenizer
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
        "logprobs": chat_logprobs(entries, _num_top(body), tokenizer) if body.logprobs else None,
        "finish_reason": deltas[-1].finish_reason,
        "stop_reason": deltas[-1].stop_reason,
    }


def _prompt_logprobs(body: ChatRequest, collected: list[list[Delta]], tokenizer: Any) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    entries = next((d.prompt_logprobs for deltas in collected for d in deltas if d.prompt_logprobs is not None), None)
    return {"prompt_logprobs": vllm_prompt_logprobs(entries, tokenizer)}


# --- a stream ---


class ChatChunks:
    """Encodes chunks. All that stays the same in one answer is encoded once, as this runs for every token."""

    def __init__(self, answer: Answer, body: ChatRequest) -> None:
        self._answer = answer
        self._tokenizer = answer.serving.text.renderer.tokenizer
        self._num_top = _num_top(body) if body.logprobs else None
        self._has_usage, self._has_continuous = body.wants_usage, body.wants_continuous_usage
        common = {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": answer.created,
            "model": answer.target.model_id,
            "system_fingerprint": answer.serving.fingerprint(answer.target),
        }
        self._head = b"data: " + encode_json(common)[:-1] + b',"choices":['
        self._starts = [self._head + b'{"index":%d,"delta":' % i for i in range(len(answer.choices))]
        self._plain_end = b'},"logprobs":null,"finish_reason":null}]'

    def begin(self) -> bytes:
        """Each choice's role, without text."""
        delta = b'{"role":"assistant","content":""'
        return b"".join(start + delta + self._plain_end + self._tail() for start in self._starts)

    def news(self, deltas: list[Delta]) -> bytes:
        return b"".join([self._delta(delta) for delta in deltas])

    def end(self) -> bytes:
        """With `include_usage` one more chunk, without choices."""
        if not self._has_usage:
            return b""
        return self._head + b'],"usage":' + encode_json(self._answer.usage.as_dict()) + b"}\n\n"

    def _delta(self, delta: Delta) -> bytes:
        """The text as one chunk, and the end, if it is one, as another."""
        out = b""
        if delta.text or delta.logprobs:
            end = self._plain_end
            if self._num_top is not None:
                logprobs = encode_json(chat_logprobs(delta.logprobs or [], self._num_top, self._tokenizer))
                end = b'},"logprobs":' + logprobs + b',"finish_reason":null}]'
            text = encode_json(delta.text)
            out = b"".join((self._starts[delta.index], b'{"content":', text, end, self._tail()))
        if delta.finish_reason is not None:
            ending = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            end = b'{},"logprobs":null,' + encode_json(ending)[1:] + b"]"
            out += self._starts[delta.index] + end + self._tail()
        return out

    def _tail(self) -> bytes:
        if self._has_continuous:
            return b',"usage":' + encode_json(self._answer.usage.as_dict()) + b"}\n\n"
        return b',"usage":null}\n\n' if self._has_usage else b"}\n\n"
