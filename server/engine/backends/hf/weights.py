"""Linear maps of the fast path: weights packed once for the machine, originals dropped.

On CPUs with AMX our own kernels read the weights (`native.py`); elsewhere oneDNN, which reorders a bf16 weight at every
call unless it is given in its own layout. int8 keeps weights and activations in 8 bits with one scale for each output
and each token, so that a sequence's numbers do not depend on its batch mates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from server.engine.backends.hf.native import Kernels
from server.errors import ConfigError

Linear = Callable[[Tensor], Tensor]
INT8_LEVELS = 127
INT8_ZERO = 128  # oneDNN's 8-bit activations are unsigned
INT8_CAPABILITIES = ("avx512_vnni", "avx_vnni", "amx_int8")


def pack(weight: Tensor, bias: Tensor | None, dtype: str, kernels: Kernels | None) -> Linear:
    """A function `[T, in] -> [T, out]` of `weight` (`[out, in]`)."""
    if dtype == "int8":
        return _int8(weight, bias, kernels)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return _PlainLinear(weight, bias)
    if kernels is not None and kernels.can_pack(weight):
        return _NativeLinear(weight, bias, kernels)
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return _PackedLinear(weight, bias) if has_onednn else _PlainLinear(weight, bias)


def check_int8(device: torch.device) -> None:
    """Raises ConfigError where 8-bit arithmetic is missing."""
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not any(found.get(name) for name in INT8_CAPABILITIES):
        raise ConfigError(
            "QLOOP_HF_DTYPE=int8 needs a CPU with 8-bit matrix instructions (AVX-VNNI, AVX512-VNNI or AMX). "
            "Use bf16, or nf4 to save memory."
        )


def _int8(weight: Tensor, bias: Tensor | None, kernels: Kernels | None) -> Linear:
    """Symmetric weights, one scale for each output."""
    scales = weight.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny) / INT8_LEVELS
    quantized = (weight.float() / scales[:, None]).round_().to(torch.int8)
    bias = None if bias is None else bias.float()
    if kernels is not None and weight.dtype == torch.bfloat16 and kernels.can_pack(quantized):
        return _NativeInt8Linear(quantized, scales, bias, kernels)
    return _Int8Linear(quantized, scales, bias)


class _PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


class _PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class _NativeLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self._kernels = kernels
        self._num_outputs = len(weight)
        self._weight = kernels.pack(weight)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.linear_bf16(x, self._weight, self._bias, self._num_outputs)


class _Int8Linear:
    """oneDNN's: uint8 activations around 128, a scale for each token."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(weight, [1, weight.shape[1]])
        self._scales = scales
        self._zero = torch.zeros(weight.shape[0], dtype=torch.int32)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        row_scale = x.abs().amax(-1, keepdim=True).float().clamp_min_(torch.finfo(torch.float32).tiny) / INT8_LEVELS
        x_uint8 = (x / row_scale).round_().add_(INT8_ZERO).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_uint8, 1.0, INT8_ZERO, self._weight, self._scales, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(row_scale)
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


class _NativeInt8Linear:
    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self._kernels = kernels
        self._weight = kernels.pack(weight)
        self._scales = scales
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.linear_int8(x, self._weight, self._scales, self._bias)
