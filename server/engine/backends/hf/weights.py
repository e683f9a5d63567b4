"""Linear maps of the fast path: weights packed once for the machine, originals dropped.

On CPUs with bf16 matrix instructions oneDNN reorders a weight at every call unless it is given in its own layout:
packed, a single token costs a third less. int8 keeps weights and activations in 8 bits with one scale a row, so that a
sequence's numbers do not depend on its batch mates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from server.errors import ConfigError

Linear = Callable[[Tensor], Tensor]
INT8_LEVELS = 127
INT8_CAPABILITIES = ("avx512_vnni", "avx_vnni", "amx_int8")


def pack(weight: Tensor, bias: Tensor | None, dtype: str) -> Linear:
    """A function `[T, in] -> [T, out]` of `weight` (`[out, in]`)."""
    if dtype == "int8":
        return _Int8Linear(weight, bias)
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_onednn:
        return _PackedLinear(weight, bias)
    return _PlainLinear(weight, bias)


def check_int8(device: torch.device) -> None:
    """Raises ConfigError where 8-bit arithmetic is missing."""
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not any(found.get(name) for name in INT8_CAPABILITIES):
        raise ConfigError(
            "QLOOP_HF_DTYPE=int8 needs a CPU with 8-bit matrix instructions (AVX-VNNI, AVX512-VNNI or AMX). "
            "Use bf16, or nf4 to save memory."
        )


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


class _Int8Linear:
    """Symmetric int8 weights per output, uint8 activations around 128 per token."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny) / INT8_LEVELS
        quantized = (weight.float() / scale[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, [1, weight.shape[1]])
        self._scale = scale
        self._zero = torch.zeros(weight.shape[0], dtype=torch.int32)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        row_scale = x.abs().amax(-1, keepdim=True).float().clamp_min_(torch.finfo(torch.float32).tiny) / INT8_LEVELS
        x_uint8 = (x / row_scale).round_().add_(INT8_LEVELS + 1).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_uint8, 1.0, 128, self._weight, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(row_scale)
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)
