"""How to start the vllm backend. Knows names and limits of vLLM's, but does not import it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from server.store.servability import VLLM_DEFAULT_RANK, VLLM_RANKS, vllm_rank_for


@dataclass(frozen=True)
class VllmOptions:
    model_path: Path
    served_name: str
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 2.0  # on CPUs
    max_model_len: int | None = None  # None: the model's own, or what the KV memory holds
    max_num_seqs: int | None = None  # None: what vLLM finds right for the device
    max_logprobs: int = 20
    enforce_eager: bool = False
    prefix_cache: bool = True
    max_loras: int = 8  # adapters in memory, and in one step; 0: none are served
    max_lora_rank: int = VLLM_DEFAULT_RANK
    trust_remote_code: bool = False
    hash_cache_path: Path | None = None
    more: Mapping[str, Any] = field(default_factory=dict)  # any other field of vLLM's AsyncEngineArgs


def lora_rank_for(ranks: list[int]) -> int:
    """`max_lora_rank` for adapters of `ranks`: it holds all that vLLM can serve."""
    return vllm_rank_for(max(ranks, default=VLLM_DEFAULT_RANK)) or VLLM_RANKS[-1]
