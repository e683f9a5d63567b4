"""Our options -> vLLM's configuration. Every name is checked: what vLLM does not know is refused, not dropped."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from server.engine.backends.vllm.options import VllmOptions
from server.errors import ConfigError

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
QUANTIZATIONS = {"int8": "int8_per_channel_weight_only"}  # the others have the names that we give them
NAMES = {theirs: ours for ours, theirs in (*DTYPES.items(), *QUANTIZATIONS.items())}
PICKLE_FORMATS = ("auto", "hf", "pt", "npcache")
GIB = 1024**3
# Arguments that have a setting of their own, or that the backend decides: vLLM's name -> what to do instead.
OWNED = {
    "model": "set QLOOP_MODEL",
    "served_model_name": "set QLOOP_SERVED_MODEL_NAME",
    "dtype": "set QLOOP_VLLM_DTYPE",
    "quantization": "set QLOOP_VLLM_QUANTIZATION",
    "kv_cache_dtype": "set QLOOP_VLLM_KV_CACHE_DTYPE",
    "tensor_parallel_size": "set QLOOP_VLLM_TENSOR_PARALLEL_SIZE",
    "pipeline_parallel_size": "set QLOOP_VLLM_PIPELINE_PARALLEL_SIZE",
    "data_parallel_size": "set QLOOP_VLLM_DATA_PARALLEL_SIZE",
    "distributed_executor_backend": "set QLOOP_VLLM_DISTRIBUTED_EXECUTOR_BACKEND",
    "gpu_memory_utilization": "set QLOOP_VLLM_GPU_MEMORY_UTILIZATION",
    "max_model_len": "set QLOOP_MAX_MODEL_LEN",
    "max_num_seqs": "set QLOOP_MAX_NUM_SEQS",
    "enforce_eager": "set QLOOP_VLLM_ENFORCE_EAGER",
    "enable_prefix_caching": "set QLOOP_PREFIX_CACHE",
    "trust_remote_code": "set QLOOP_TRUST_REMOTE_CODE",
    "enable_lora": "set QLOOP_VLLM_ENABLE_LORA",
    "max_loras": "set QLOOP_MAX_ADAPTERS",
    "max_cpu_loras": "set QLOOP_MAX_ADAPTERS",
    "max_lora_rank": "set QLOOP_MAX_ADAPTER_RANK",
    "max_logprobs": "leave it out: the API has its own limit",
    "scheduling_policy": "leave it out: requests carry priorities",
    "skip_tokenizer_init": "leave it out: the engine sees token ids only",
    "generation_config": "leave it out: the API applies the model's defaults",
    "disable_log_stats": "leave it out: /metrics needs them",
    "enable_log_requests": "leave it out: requests are never logged",
    "max_num_queued_reqs": "set QLOOP_MAX_QUEUE",
    "max_num_queued_tokens": "set QLOOP_MAX_QUEUE",
    "stream_interval": "leave it out: every token is sent",
}


def weights_type(config: Any) -> str:
    """Of vLLM's ModelConfig, in our words: its quantization, or bf16, fp16, fp32."""
    name = str(config.quantization or config.dtype).removeprefix("torch.")
    return NAMES.get(name, name)


def engine_config(options: VllmOptions) -> VllmConfig:
    """Raises ConfigError for whatever vLLM does not accept.

    As for vLLM's own server: for other contexts it makes the batches of large GPUs much smaller.
    """
    arguments = engine_arguments(options)
    try:
        return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        raise ConfigError(f"vLLM refuses to serve {options.model_path} with these settings: {error}") from error


def engine_arguments(options: VllmOptions) -> AsyncEngineArgs:
    """Raises ConfigError for an unknown or owned name in `options.more`."""
    _check_names(options.more)
    arguments: dict[str, Any] = {
        "model": str(options.model_path),
        "served_model_name": options.served_name,
        "dtype": DTYPES[options.dtype],
        "quantization": QUANTIZATIONS.get(options.quantization or "", options.quantization),
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "distributed_executor_backend": options.distributed_executor_backend,
        "max_model_len": options.max_model_len or -1,  # -1: as much of the model's own as fits
        "max_num_seqs": options.max_num_seqs,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.prefix_cache,
        "trust_remote_code": options.trust_remote_code,
        "load_format": "safetensors",  # never pickle
        "max_logprobs": -1,  # ours is checked before; logprob_token_ids need the whole vocabulary
        "scheduling_policy": "priority",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no defaults: requests carry every parameter
        "enable_log_requests": False,
    }
    if options.max_loras:
        # vLLM's CPU kernels compute tokens that have no adapter with the last slot's: one slot more, and it stays zero.
        slots = options.max_loras + current_platform.is_cpu()
        arguments |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": options.max_lora_rank}
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * GIB)
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    return AsyncEngineArgs(**{**arguments, **options.more})


def _check_names(more: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")]
    for name in more:
        if name in OWNED:
            raise ConfigError(f"QLOOP_VLLM_ARGS: {name!r} cannot be given here; {OWNED[name]}.")
        if name not in known:
            match = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {match[0]!r}?" if match else ""
            raise ConfigError(f"QLOOP_VLLM_ARGS: vLLM has no engine argument {name!r}{hint}")
    if more.get("load_format") in PICKLE_FORMATS:
        raise ConfigError("QLOOP_VLLM_ARGS: this load_format may read pickled weights. Convert them to safetensors.")
