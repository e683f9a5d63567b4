"""Bytes of a model's weights in each number format.

fp32 4, bf16 and fp16 2 bytes a number. int8 (LLM.int8, arXiv:2208.07339): 1 byte and a float32 per output row. nf4
(QLoRA, arXiv:2305.14314): half a byte, one constant per block of 64, itself stored in 8 bits with a float32 per 256 of
them. Quantized are the linear layers of the decoder; embeddings, norms, biases and the output layer stay as they are.
"""

from pathlib import Path

from server.errors import ConfigError
from trainer.estimate.shape import ModelShape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FORMATS = (*BYTES, "int8", "nf4")
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # of torch's formats
SAVED_FORMATS = {4: "nf4", 8: "int8"}  # of weights that bitsandbytes quantizes to so many bits
NF4_BLOCK, NF4_GROUP = 64, 256
# Of each quantized matrix beside its constants: the 16 values of nf4, the 256 of its constants' code, their offset.
NF4_TABLES = 4 * (16 + 256) + 4


def weight_bytes(shape: ModelShape, number: str, *, kept: str = "bf16") -> int:
    """All weights in `number`; of int8 and nf4, what is not quantized is in `kept`. Raises ConfigError."""
    if number in BYTES:
        return shape.num_parameters * BYTES[number]
    if number not in FORMATS:
        raise ConfigError(f"weights in {number}: accepted are {', '.join(FORMATS)}")
    rest = (shape.num_parameters - shape.num_linear_weights) * BYTES[kept]
    return rest + shape.layers * sum(_quantized(linear.num_weights, linear.outputs, number) for linear in shape.linears)


def _quantized(num_weights: int, outputs: int, number: str) -> int:
    if number == "int8":
        return num_weights + 4 * outputs
    blocks = -(-num_weights // NF4_BLOCK)
    return -(-num_weights // 2) + blocks + 4 * -(-blocks // NF4_GROUP) + NF4_TABLES


def file_bytes(folder: Path) -> int:
    """Of a model folder's safetensors files; 0 where there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
