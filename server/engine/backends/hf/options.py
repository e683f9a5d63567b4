"""How to start the hf backend."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class HfOptions:
    model_path: Path
    served_name: str
    # auto: the checkpoint's own; fp16 becomes bf16. int8: weights and activations; nf4, bnb-int8: by bitsandbytes.
    dtype: Literal["auto", "bf16", "fp32", "fp16", "int8", "nf4", "bnb-int8"] = "auto"
    forward: Literal["auto", "generic"] = "auto"  # auto: our own where the architecture is known; generic: the model's
    prefix_cache: bool = True  # keep finished prompts' keys and values for later ones that begin the same
    kv_cache_gib: float = 4.0  # the KV store never grows beyond this
    max_model_len: int | None = None  # None: the model's own limit
    max_num_seqs: int = 64
    max_logprobs: int = 20
    trust_remote_code: bool = False
    num_threads: int | None = None  # None: torch's choice
    hash_cache_path: Path | None = None  # remembers the weights' hash between starts
    kernel_cache: Path | None = None  # folder of our own compiled kernels; None: they are not used
    prefill_chunk: int = 512  # most prompt tokens computed in one step
