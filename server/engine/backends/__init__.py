"""Whatever computes tokens, each behind `base.Backend`. Heavy libraries are imported only by the one chosen."""

import importlib.util
from pathlib import Path

from server.engine.backends.base import Backend
from server.errors import ConfigError
from server.settings import DEMO_MODEL, Settings, prepare_vllm
from server.store.home import Home
from server.store.model_folder import default_served_name, resolve_model
from server.store.registry import Registry

MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs
MAX_NUM_SEQS = 128


def create_backend(settings: Settings) -> Backend:
    """The backend that QLOOP_ENGINE names. Raises ConfigError when the model is not there."""
    home = Home(settings.home)
    folder = resolve_model(settings.model or DEMO_MODEL, home)
    name = settings.served_model_name or default_served_name(settings.model or DEMO_MODEL)
    if settings.engine == "fake":
        from server.engine.backends.fake import FakeBackend, FakeOptions

        return FakeBackend(
            FakeOptions(
                model_path=folder,
                served_name=name,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs or MAX_NUM_SEQS,
                max_logprobs=MAX_LOGPROBS,
                tokens_per_s=settings.fake_tokens_per_s,
            )
        )
    if settings.engine == "vllm" or (settings.engine == "auto" and _is_installed("vllm") and _has_gpu()):
        return _create_vllm(settings, home, folder, name)
    from server.engine.backends.hf import HfBackend, HfOptions

    return HfBackend(
        HfOptions(
            model_path=folder,
            served_name=name,
            dtype=settings.hf_dtype,
            forward=settings.hf_forward,
            prefix_cache=settings.prefix_cache,
            kv_cache_gib=settings.kv_cache_gib,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs or MAX_NUM_SEQS,
            max_logprobs=MAX_LOGPROBS,
            trust_remote_code=settings.trust_remote_code,
            num_threads=settings.num_threads,
            hash_cache_path=home.hash_cache,
            kernel_cache=home.cache if settings.hf_kernels == "auto" else None,
        )
    )


def _create_vllm(settings: Settings, home: Home, folder: Path, name: str) -> Backend:
    if not _is_installed("vllm"):
        raise ConfigError(
            "QLOOP_ENGINE=vllm, but this Python has no vLLM. Run `make vllm`, or without a GPU `make vllm-cpu`, "
            "then start with `.venv-vllm/bin/python -m server`. Or set QLOOP_ENGINE=hf."
        )
    prepare_vllm(settings)
    from server.engine.backends.vllm import VllmBackend, VllmOptions
    from server.engine.backends.vllm.options import lora_rank_for

    published = [entry.card.rank for entry in Registry(home.adapters).entries() if entry.card.method == "lora"]
    return VllmBackend(
        VllmOptions(
            model_path=folder,
            served_name=name,
            dtype=settings.vllm_dtype,
            quantization=settings.vllm_quantization,
            kv_cache_dtype=settings.vllm_kv_cache_dtype,
            tensor_parallel_size=settings.vllm_tensor_parallel_size,
            pipeline_parallel_size=settings.vllm_pipeline_parallel_size,
            data_parallel_size=settings.vllm_data_parallel_size,
            distributed_executor_backend=settings.vllm_distributed_executor_backend,
            gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
            kv_cache_gib=settings.kv_cache_gib,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_logprobs=MAX_LOGPROBS,
            enforce_eager=settings.vllm_enforce_eager,
            prefix_cache=settings.prefix_cache,
            max_loras=settings.max_adapters if settings.vllm_enable_lora else 0,
            max_lora_rank=lora_rank_for([settings.max_adapter_rank] if settings.max_adapter_rank else published),
            trust_remote_code=settings.trust_remote_code,
            hash_cache_path=home.hash_cache,
            more=settings.vllm_args,
        )
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
