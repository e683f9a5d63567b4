"""A model folder on disk -> a causal language model in memory, or a ConfigError that says what to do.

Safetensors only. Knows nothing about requests.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from server.engine.backends.hf.kv_cache import KvShape
from server.engine.backends.hf.options import HfOptions
from server.errors import ConfigError
from server.store.model_folder import check_model_folder

log = logging.getLogger(__name__)

MOVING_ROPES = ("dynamic", "longrope")  # their angles change with the batch's longest sequence
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


def load_model(options: HfOptions) -> PreTrainedModel:
    """The model in eval mode, on the GPU if there is one. Weights that are missing are an error, never random."""
    folder = options.model_path
    check_model_folder(folder)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = options.trust_remote_code
    try:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # a log is no terminal
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        check_supported(config, folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=_choose_dtype(options, config),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise ConfigError(f"The model in {folder} cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ConfigError(
            f"The weights in {folder} lack {len(missing)} tensors of this architecture ({missing[0]}, …). "
            "The folder is incomplete or is not a causal language model; download it again."
        )
    model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type, unused-ignore]
    return model


def kv_shape(model: PreTrainedModel) -> KvShape:
    config = model.config
    num_heads = config.num_attention_heads
    return KvShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=model.dtype,
        device=model.device,
    )


def context_limit(config: Any) -> int:
    """Positions the model is good for. Sliding-window layers are computed in full, exact up to their window."""
    limit: int = config.max_position_embeddings
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and config.sliding_window:
        log.warning("sliding-window attention: the context is limited to the window of %d", config.sliding_window)
        limit = min(limit, config.sliding_window)
    return limit


def check_supported(config: Any, folder: Path) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{folder}: layers of type {sorted(unknown)} are not supported by the hf backend. Use vllm.")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in MOVING_ROPES:
        raise ConfigError(
            f"{folder}: rope type {rope['rope_type']!r} cannot be batched by the hf backend. "
            "Set a static one (yarn, linear or default) in config.json, or use vllm."
        )


def _choose_dtype(options: HfOptions, config: Any) -> torch.dtype:
    if options.dtype != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    saved = config.dtype or torch.float32
    if saved in (torch.bfloat16, torch.float32):
        return torch.bfloat16 if saved == torch.bfloat16 else torch.float32
    log.info("the checkpoint is %s; running it in bfloat16", saved)
    return torch.bfloat16
