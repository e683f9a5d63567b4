"""A model folder -> the same model in nf4 or int8, a folder that the hf engine serves.

By bitsandbytes; the head and the embeddings keep their dtype. Knows nothing about training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.errors import ConfigError
from server.store.model_folder import check_model_folder, read_model_config
from trainer.methods.base_model import load_base, saved_dtype
from trainer.results.comparison import logits_of, prompt_ids, same_tokens
from trainer.results.save import written_aside
from trainer.results.text_files import copy_text_files

KINDS = {4: "nf4", 8: "int8"}


@dataclass(frozen=True)
class QuantizeReport:
    """`gap`: mean difference of a log-probability from the model that was quantized, in nat."""

    output: Path
    kind: str
    num_bytes: int
    base_bytes: int
    gap: float
    same_tokens: float  # share of places where the most likely token is the same

    def __str__(self) -> str:
        return (
            f"{self.kind} in {self.output}: {self.num_bytes / 2**20:,.1f} MiB instead of "
            f"{self.base_bytes / 2**20:,.1f}; log-probabilities differ by {self.gap:.2g} nat on average, the likeliest "
            f"token is the same at {100 * self.same_tokens:.1f}% of places\nserve it with QLOOP_ENGINE=hf"
        )


def quantize(model: Path, output: Path, bits: int, *, trust: bool = False) -> QuantizeReport:
    """Quantize the model folder `model` into `output`. Raises ConfigError; nothing is left at `output` then."""
    if bits not in KINDS:
        raise ConfigError(f"bits={bits}: accepted are {', '.join(map(str, KINDS))}")
    if output.exists():
        raise ConfigError(f"{output}: exists already; choose another output, or remove it")
    check_model_folder(model)
    if read_model_config(model).get("quantization_config"):
        raise ConfigError(f"{model}: is quantized already; name the 16-bit model")
    prompts = prompt_ids(model)
    dtype = _kept_dtype(model)
    expected = logits_of(load_base(model, dtype=dtype, trust_remote_code=trust), prompts).log_softmax(-1)
    with written_aside(output) as aside:
        _write(model, aside, bits, dtype, trust)
        found = logits_of(_reloaded(aside, dtype, trust), prompts).log_softmax(-1)
    return QuantizeReport(
        output=output,
        kind=KINDS[bits],
        num_bytes=_weight_bytes(output),
        base_bytes=_weight_bytes(model),
        gap=float((expected - found).abs().mean()),
        same_tokens=same_tokens(expected, found),
    )


def _kept_dtype(model: Path) -> torch.dtype:
    """bitsandbytes computes in it; fp16 is no use on CPUs."""
    dtype = saved_dtype(model)
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _write(model: Path, folder: Path, bits: int, dtype: torch.dtype, trust: bool) -> None:
    """Nothing runs the model before it is saved: on some CPUs inference changes the packing of nf4 weights."""
    quantized = load_base(model, dtype=dtype, bits=bits, trust_remote_code=trust)
    quantized.save_pretrained(folder)
    copy_text_files(model, folder)


def _reloaded(folder: Path, dtype: torch.dtype, trust: bool) -> Any:
    check_model_folder(folder)
    return load_base(folder, dtype=dtype, trust_remote_code=trust)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
