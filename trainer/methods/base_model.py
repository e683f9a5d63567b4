"""A base model's folder -> a model in memory, for training, merging and quantizing.

Safetensors only, no network, code in the folder only on request. Knows nothing about methods.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from server.errors import ConfigError
from server.store.model_folder import read_model_config, saved_format
from trainer.errors import DoesNotFit, does_not_fit, first_line, is_memory_fault

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    bits: int = 0,
    trust_remote_code: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    new_head: tuple[str, ...] = ("score.", "classifier."),
    **options: Any,
) -> Any:
    """The model with its trained weights; `bits` 4 or 8: quantized by bitsandbytes on the way in.

    `dtype` is that of everything that is not quantized, and what quantized layers compute in. `auto_class` may be
    AutoModelForSequenceClassification, whose head (`new_head`) begins random.
    Raises ConfigError, also when weights are missing, and DoesNotFit.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a run shows one bar of its own
    config = read_model_config(folder)
    if bits and find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization_bit={bits} needs bitsandbytes: pip install 'qloop[bnb]'")
    if bits and not config.get("quantization_config"):
        options["quantization_config"] = bits_config(bits, dtype)
    try:
        loaded = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except LOAD_ERRORS as error:
        raise _cannot_load(folder, config, trust_remote_code, error) from error
    model, report = loaded
    _keep_trainable_after_inference(model)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(new_head))
    if missing:
        raise ConfigError(
            f"{folder}: its weights lack {len(missing)} tensors of this architecture ({missing[0]}, …); the folder is "
            "incomplete or holds no causal language model: download it again"
        )
    return model


def load_blank(
    folder: Path, *, dtype: torch.dtype, attention: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The architecture of the folder's config.json with random weights."""
    config = read_model_config(folder)
    try:
        built = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            built, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise _cannot_load(folder, config, trust_remote_code, error) from error


def bits_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with quantized scales (Dettmers et al. 2023, arXiv:2305.14314), or LLM.int8 (arXiv:2208.07339)."""
    if bits == 8:
        # It says at every layer that it computes in fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def saved_dtype(folder: Path) -> torch.dtype:
    """The dtype that the folder's config.json names; float32 where it names none."""
    return DTYPES.get(saved_format(read_model_config(folder)), torch.float32)


def _keep_trainable_after_inference(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks nf4 weights at the first inference; training would then fail."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _cannot_load(folder: Path, config: Mapping[str, Any], trusted: bool, error: Exception) -> ConfigError | DoesNotFit:
    if is_memory_fault(error):
        return does_not_fit(error)
    if config.get("auto_map") and not trusted:
        return ConfigError(
            f"{folder}: its {config['model_type']} model is Python code in that folder, which is not run unasked; read "
            "the code, then set trust_remote_code=true"
        )
    return ConfigError(f"{folder}: cannot be loaded ({type(error).__name__}: {first_line(error)})")
