"""Is a safetensors file whole? Reads its header only, so neither torch nor the weights are loaded.

Format: 8 bytes little-endian header length, a JSON header with each tensor's dtype, shape and byte range, then the
data (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bits per element; a dtype that is not listed is only checked for its byte range.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8}


class BrokenFile(ValueError):
    """A safetensors file that is truncated, malformed or not one at all."""


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets}, checked against the file's size. Raises BrokenFile."""
    header, data_bytes = _load_header(path)
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in sorted(header.items(), key=_start):
        begin, stop = _check_tensor(path, name, tensor)
        if begin != end:
            raise BrokenFile(f"{path}: tensor {name!r} begins at byte {begin} of the data, {end} was expected")
        end = stop
    if end != data_bytes:
        raise BrokenFile(
            f"{path}: the header promises {end} bytes of tensors, the file has {data_bytes}; "
            "it is truncated or damaged: copy or download it again"
        )
    return header


def _load_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BrokenFile(f"{path}: not a whole safetensors file ({size} bytes): copy or download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw, parse_constant=_refuse_constant)
    except ValueError:
        raise BrokenFile(f"{path}: its header is not JSON, so it is not a safetensors file") from None
    if not isinstance(header, dict) or not all(isinstance(tensor, dict) for tensor in header.values()):
        raise BrokenFile(f"{path}: its header does not describe tensors")
    return header, size - 8 - length


def _check_tensor(path: Path, name: str, tensor: dict[str, Any]) -> tuple[int, int]:
    shape, offsets, dtype = _counts(tensor.get("shape")), _counts(tensor.get("data_offsets")), tensor.get("dtype")
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(dtype, str):
        raise BrokenFile(f"{path}: the header entry of tensor {name!r} is malformed")
    begin, stop = offsets
    wanted = math.prod(shape) * _BITS.get(dtype, 0) // 8
    if stop < begin or (dtype in _BITS and stop - begin != wanted):
        raise BrokenFile(f"{path}: tensor {name!r} of shape {shape} and type {dtype} cannot have {stop - begin} bytes")
    return begin, stop


def _counts(value: Any) -> list[int] | None:
    """`value` if it is a list of whole numbers from 0 up."""
    is_list = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if is_list else None


def _start(item: tuple[str, dict[str, Any]]) -> list[int]:
    return _counts(item[1].get("data_offsets")) or []


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)
