"""A model folder on disk -> a network in memory that is known to compute what the model's own code does.

Safetensors only. Knows nothing about requests.
"""

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from server.engine.backends.hf.adapter_files import ModelShape, model_shape
from server.engine.backends.hf.fast import FastNetwork, can_run_fast
from server.engine.backends.hf.generic import GenericNetwork
from server.engine.backends.hf.kv_store import KvShape, is_lazy, kv_shape
from server.engine.backends.hf.memory import return_freed_memory
from server.engine.backends.hf.native import load_kernels
from server.engine.backends.hf.network import Network
from server.engine.backends.hf.options import HfOptions
from server.engine.backends.hf.probe import reference_logits
from server.engine.backends.hf.weights import check_int8
from server.errors import ConfigError
from server.store.model_folder import check_model_folder, read_model_config

log = logging.getLogger(__name__)

MOVING_ROPES = ("dynamic", "longrope")  # their angles change with the batch's longest sequence
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
FALLBACK_CONTEXT = 2048  # for models with relative positions that name no limit
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITSANDBYTES = ("nf4", "bnb-int8")
QUANTIZED = ("int8", *BITSANDBYTES)


@dataclass(frozen=True)
class Loaded:
    """`expected_logits` are the untouched model's for `probe.probe_ids`."""

    network: Network
    modules: ModelShape
    expected_logits: Tensor
    dtype: str
    max_model_len: int
    max_cells: int
    num_rows: int


def load_network(options: HfOptions) -> Loaded:
    """Read the folder, ask the model itself for the probe's logits, and take it over. Raises ConfigError."""
    options = replace(options, dtype=saved_or_wanted_dtype(options))
    model = load_model(options)
    shape = kv_shape(model)
    max_cells = int(options.kv_cache_gib * 2**30) // shape.bytes_per_cell // shape.page_cells * shape.page_cells
    max_len = _max_model_len(model.config, options, max_cells)
    expected = reference_logits(model)
    modules = model_shape(model, max_len)
    network: Network
    if options.forward == "auto" and options.dtype not in BITSANDBYTES and can_run_fast(model.config):
        is_bf16_cpu = shape.dtype == torch.bfloat16 and shape.device.type == "cpu"
        kernels = load_kernels(options.kernel_cache) if options.kernel_cache and is_bf16_cpu else None
        network = FastNetwork(model, shape, max_len, options.dtype, kernels)
    elif options.dtype == "int8":
        raise ConfigError(
            f"QLOOP_HF_DTYPE=int8 is not there for {model.config.model_type} models. Use bf16, or bnb-int8 or nf4."
        )
    else:
        network = GenericNetwork(model, shape, modules)
    del model
    return_freed_memory()
    dtype = options.dtype if options.dtype in QUANTIZED else NAMES[shape.dtype]
    return Loaded(network, modules, expected, dtype, max_len, max_cells, _num_rows(options, shape, max_len, max_cells))


def load_model(options: HfOptions) -> PreTrainedModel:
    """The model in eval mode, on the GPU if there is one. Weights that are missing are an error, never random."""
    folder = options.model_path
    check_model_folder(folder)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype == "int8":
        check_int8(device)
    if options.dtype in BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise ConfigError(f"QLOOP_HF_DTYPE={options.dtype} needs bitsandbytes: pip install 'qloop[bnb]'.")
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
            quantization_config=_quantization(options, config),
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
    if options.dtype not in BITSANDBYTES:
        model.to(device)  # type: ignore[arg-type, unused-ignore]
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    _keep_odd_shapes_unpacked(model)
    return model


def _keep_odd_shapes_unpacked(model: PreTrainedModel) -> None:
    """bitsandbytes' packing of nf4 weights for CPUs with AVX512-BF16 fails unless inputs fill its blocks of 64."""
    module: Any
    for module in model.modules():
        is_odd = getattr(module, "in_features", 0) % 64 or getattr(module, "out_features", 0) % 32
        if is_odd and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def saved_or_wanted_dtype(options: HfOptions) -> Any:
    """`options.dtype`, or for a folder that bitsandbytes quantized the dtype it was saved in."""
    check_model_folder(options.model_path)
    quantized = read_model_config(options.model_path).get("quantization_config")
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "bitsandbytes":
        return options.dtype
    saved = "nf4" if quantized.get("load_in_4bit") else "bnb-int8"
    if options.dtype not in ("auto", saved):
        raise ConfigError(
            f"The weights in {options.model_path} are saved as {saved} and cannot be {options.dtype}. "
            "Set QLOOP_HF_DTYPE=auto, or serve the model they were made from."
        )
    return saved


def _max_model_len(config: Any, options: HfOptions, max_cells: int) -> int:
    """The longest text that model, operator and memory allow. Raises ConfigError when the operator wants too much."""
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or FALLBACK_CONTEXT
    wanted = options.max_model_len or own
    if wanted > own:
        raise ConfigError(f"QLOOP_MAX_MODEL_LEN={wanted}, but this model has {own} positions. Set at most {own}.")
    if max_cells < (options.max_model_len or 1):
        raise ConfigError(
            f"QLOOP_KV_CACHE_GIB={options.kv_cache_gib:g} holds {max_cells} tokens of this model, fewer than one text "
            f"may have ({wanted}). Raise it, or lower QLOOP_MAX_MODEL_LEN."
        )
    if max_cells < wanted:
        log.warning("the KV cache holds %d tokens: the context ends there and not at %d", max_cells, wanted)
    return min(wanted, max_cells)


def _num_rows(options: HfOptions, shape: KvShape, max_len: int, max_cells: int) -> int:
    """Rows of the KV store. Where memory is only taken when it is used, there are some more for kept prefixes."""
    if is_lazy(shape):
        return 2 * options.max_num_seqs
    return max(1, min(options.max_num_seqs, max_cells // shape.round_up(max_len)))


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
    if options.dtype in DTYPES:
        return DTYPES[options.dtype]
    saved = torch.bfloat16 if options.dtype in QUANTIZED else config.dtype or torch.float32
    if saved in (torch.bfloat16, torch.float32):
        return torch.bfloat16 if saved == torch.bfloat16 else torch.float32
    log.info("the checkpoint is %s; running it in bfloat16", saved)
    return torch.bfloat16


def _quantization(options: HfOptions, config: Any) -> Any:
    """bitsandbytes' settings, or the checkpoint's own (None)."""
    if getattr(config, "quantization_config", None):
        return None
    if options.dtype == "nf4":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_choose_dtype(options, config)
        )
    return BitsAndBytesConfig(load_in_8bit=True) if options.dtype == "bnb-int8" else None  # type: ignore[no-untyped-call]
