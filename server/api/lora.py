"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, so that its clients work here unchanged.

Bodies, statuses and success texts as in vLLM 0.32; errors have OpenAI's envelope, as everywhere here.
"""

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from server.api.adapter_admin import AdapterAdmin, model_id_of
from server.api.operator import operator_body
from server.api.protocol import LoadLoraRequest, UnloadLoraRequest
from server.errors import InvalidRequest


async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """`lora_path` is imported as a new revision of `lora_name`, which then means it."""
    serving, body = await operator_body(request, LoadLoraRequest)
    model_id = model_id_of(body.lora_name, "lora_name")
    name = model_id.name
    if model_id.revision is not None:
        raise InvalidRequest(
            "The revision follows from the content of 'lora_path': give the name alone.",
            param="lora_name",
            code="invalid_value",
        )
    if body.is_3d_lora_weight:
        raise InvalidRequest(
            "Adapters of fused experts are not supported.", param="is_3d_lora_weight", code="unsupported_parameter"
        )
    is_loaded = any(adapter.name == name and adapter.is_current for adapter in serving.client.adapters)
    if is_loaded and not body.load_inplace:
        raise InvalidRequest(
            f"The lora adapter '{name}' has already been loaded. For a new revision set 'load_inplace' to true.",
            param="lora_name",
            code="already_loaded",
        )
    await AdapterAdmin(serving).add(body.lora_path, name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Returns when its last request is done. `name` is all its revisions, `name@revision` one.

    `lora_int_id` is accepted and, as in vLLM, has no effect.
    """
    serving, body = await operator_body(request, UnloadLoraRequest)
    model_id = model_id_of(body.lora_name, "lora_name")
    await AdapterAdmin(serving).unload(model_id)
    return PlainTextResponse(f"Success: LoRA adapter '{model_id}' removed successfully.")
