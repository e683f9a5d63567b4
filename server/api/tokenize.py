"""`POST /tokenize` and `/detokenize`, in vLLM's shapes. The engine is not asked, only its model folder is used."""

from starlette.requests import Request
from starlette.responses import Response

from server.api.chat import render_chat
from server.api.parsing import parse
from server.api.protocol import DetokenizeRequest, TokenizeRequest
from server.api.request import begin, in_thread_if_long, response_headers
from server.api.sse import encode_json
from server.errors import InvalidRequest
from server.text.tokenizer import TextError


async def tokenize(request: Request) -> Response:
    serving, raw = await begin(request)
    body, ignored = parse(TokenizeRequest, raw, is_lenient=serving.settings.unknown_params == "warn")
    serving.resolve(body.model)
    renderer = serving.text.renderer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
    if body.messages is not None:
        ids = await render_chat(
            renderer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            template_kwargs=body.chat_template_kwargs or {},
        )
    else:
        text, add_special = body.prompt or "", body.add_special_tokens is not False
        try:
            ids = await in_thread_if_long(
                len(text), lambda: renderer.tokenizer.encode_raw(text, add_special_tokens=add_special)
            )
        except TextError as error:
            raise InvalidRequest(str(error), param="prompt", code="invalid_value") from None
    strings = [renderer.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": serving.model.max_model_len, "tokens": ids, "token_strs": strings}
    return Response(encode_json(answer), media_type="application/json", headers=response_headers(ignored))


async def detokenize(request: Request) -> Response:
    serving, raw = await begin(request)
    body, ignored = parse(DetokenizeRequest, raw, is_lenient=serving.settings.unknown_params == "warn")
    serving.resolve(body.model)
    tokenizer = serving.text.renderer.tokenizer
    try:
        text = await in_thread_if_long(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
    except ValueError as error:
        raise InvalidRequest(str(error), param="tokens", code="invalid_value") from None
    return Response(encode_json({"prompt": text}), media_type="application/json", headers=response_headers(ignored))
