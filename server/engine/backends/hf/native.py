"""`kernels.c`, compiled on the machine that runs it, and its functions for tensors.

oneDNN reads a weight at half the memory's speed when a step has few tokens; these kernels read it at the memory's.
Compiled by gcc at the first start (a second or two), kept in the cache folder. Where that cannot be done everything
works as well, slower, and the log says why. Knows nothing about models.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from server.engine.backends.hf.arithmetic import Heads
from server.engine.backends.hf.batch import Batch
from server.engine.backends.hf.kv_store import KvShape

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
# GNU's OpenMP is the one that torch uses on Linux: both share one team of threads.
COMMAND = ("gcc", "-O3", "-shared", "-fPIC", "-fopenmp")
COMPILE_TIMEOUT_S = 60.0
NEEDED = ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16")
SLOWER = "answers will be slower than this CPU could give them"
OUTPUTS = 32  # a weight's outputs come in blocks of so many,
LINE_BYTES = 64  # its inputs in pieces of so many bytes


class _Heads(ctypes.Structure):
    """`Heads` of kernels.c."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("projected", "cos", "sin", "query_norm", "key_norm", "rows", "cells")),
        *((name, c_void_p) for name in ("queries", "keys", "values")),
        *((name, c_long) for name in ("tokens", "heads", "kv_heads", "size", "capacity")),
        ("epsilon", c_float),
    ]


class LoraCall(ctypes.Structure):
    """`Lora` of kernels.c: pointers and sizes of one call."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "a", "b", "ends", "own", "live", "y")),
        *((name, c_long) for name in ("tokens", "inputs", "outputs", "parts", "num_live")),
    ]


class Kernels:
    """The compiled functions; tensors are bf16 on the CPU. Implements `Arithmetic`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear_bf16 = _declare(library.amx_linear_bf16, [c_void_p] * 4 + [c_long] * 3 + [c_int])
        self._linear_int8 = _declare(library.amx_linear_int8, [c_void_p] * 5 + [c_long] * 3 + [c_int], c_int)
        self._add_and_norm = _declare(library.add_and_norm, [c_void_p] * 4 + [c_long] * 2 + [c_float, c_int])
        self._silu_and_multiply = _declare(library.silu_and_multiply, [c_void_p] * 2 + [c_long] * 2 + [c_int])
        self._add_lora = _declare(library.add_lora, [ctypes.POINTER(LoraCall), c_int], c_int)
        self._turn_and_store = _declare(library.turn_and_store, [ctypes.POINTER(_Heads), c_int])

    @staticmethod
    def suits(shape: KvShape, *sizes: int) -> bool:
        """True if the arithmetic between linear maps can be done here: heads and `sizes` fill whole registers."""
        return shape.dtype == torch.bfloat16 and shape.head_dim % 32 == 0 and all(size % 16 == 0 for size in sizes)

    @staticmethod
    def can_pack(weight: Tensor) -> bool:
        """True for bf16 or int8 weights `[out, in]` whose sizes are multiples of the tiles'."""
        outputs, inputs = weight.shape
        return outputs % OUTPUTS == 0 and inputs * weight.element_size() % LINE_BYTES == 0

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """`[out, in]` in the order in which the tiles read it: `[out / 32, in / piece, 2, 16, 16, group]`."""
        group = 4 // weight.element_size()
        outputs, inputs = weight.shape
        tiles = weight.view(outputs // OUTPUTS, 2, 16, inputs // (16 * group), 16, group)
        return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()

    def linear_bf16(self, x: Tensor, packed: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """`[T, out]`; `bias` is float32 `[out]`."""
        x = x.contiguous()
        y = x.new_empty(len(x), num_outputs)
        self._linear_bf16(x.data_ptr(), packed.data_ptr(), _pointer(bias), y.data_ptr(), *_sizes(x, y))
        return y

    def linear_int8(self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """`[T, out]`; `scales` and `bias` are float32 `[out]`. Tokens are quantized one by one."""
        x = x.contiguous()
        y = x.new_empty(len(x), len(scales))
        pointers = (x.data_ptr(), packed.data_ptr(), scales.data_ptr(), _pointer(bias), y.data_ptr())
        if self._linear_int8(*pointers, *_sizes(x, y)):
            raise MemoryError("no memory for 8-bit activations")
        return y

    def add_and_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        out = torch.empty_like(hidden)
        pointers = (hidden.data_ptr(), _pointer(delta), weight.data_ptr(), out.data_ptr())
        self._add_and_norm(*pointers, *hidden.shape, epsilon, torch.get_num_threads())
        return out

    def silu_and_multiply(self, both: Tensor) -> Tensor:
        out = both.new_empty(len(both), both.shape[1] // 2)
        self._silu_and_multiply(both.data_ptr(), out.data_ptr(), *out.shape, torch.get_num_threads())
        return out

    def turn_and_store(
        self, projected: Tensor, heads: Heads, cos: Tensor, sin: Tensor, layer: int, batch: Batch
    ) -> Tensor:
        queries = projected.new_empty(len(projected), heads.heads, heads.size)
        asked = _Heads(
            projected=projected.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            query_norm=_pointer(heads.query_norm),
            key_norm=_pointer(heads.key_norm),
            rows=batch.rows.data_ptr(),
            cells=batch.positions.data_ptr(),
            queries=queries.data_ptr(),
            keys=batch.store.keys[layer].data_ptr(),
            values=batch.store.values[layer].data_ptr(),
            tokens=len(projected),
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            size=heads.size,
            capacity=batch.store.capacity,
            epsilon=heads.epsilon,
        )
        self._turn_and_store(asked, torch.get_num_threads())
        return queries

    def add_lora(self, call: LoraCall) -> None:
        if self._add_lora(call, torch.get_num_threads()):
            raise MemoryError("no memory for what adapters compute")


def load_kernels(cache: Path) -> Kernels | None:
    """Compiled into the folder `cache` unless they are there. None where this CPU or this machine's tools lack what is
    needed."""
    if platform.system() != "Linux" or not all(torch.cpu.get_capabilities().get(name) for name in NEEDED):
        return None
    try:
        library = ctypes.CDLL(str(_compiled(cache)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s: no compiled kernels, %s", SLOWER, _reason(error))
        return None
    if library.amx_request() != 0:
        log.warning("%s: Linux gives no permission to use AMX", SLOWER)
        return None
    return Kernels(library)


def _compiled(cache: Path) -> Path:
    """The shared object; named by what it was made from, so that an old one is never used for a new source."""
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMMAND).encode()).hexdigest()[:16]
    path = cache / f"kernels-{name}.so"
    if path.is_file():
        return path
    if shutil.which(COMMAND[0]) is None:
        raise FileNotFoundError(f"{COMMAND[0]} is not installed (Debian and Ubuntu: apt-get install gcc libc6-dev)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / path.name
        command = [*COMMAND, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S, text=True)
        os.replace(made, path)
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line]
        return f"gcc failed, {lines[0] if lines else error}"
    return str(error)


def _declare(function: Any, arguments: list[Any], result: Any = None) -> Any:
    function.argtypes, function.restype = arguments, result
    return function


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    return len(x), y.shape[1], x.shape[1], torch.get_num_threads()
