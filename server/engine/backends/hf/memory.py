"""Give freed memory back to the operating system; torch and malloc otherwise keep it for later."""

import ctypes
import sys

import torch


def return_freed_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; musl has none
        if trim is not None:
            trim(0)
