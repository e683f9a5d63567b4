"""Rows of logits seen as chunks of CHUNK neighbouring ids.

The maxima of the chunks are a hundredth of a row, found at the speed of memory; they say where in the row to look, so
that nothing needs to sort or search a whole vocabulary. Knows nothing about sequences or sampling.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 128  # divides the vocabularies of Qwen2, Qwen2.5, Qwen3, Llama 3, Mistral, GLM-4 and Bloom: no copy for those


def in_chunks(rows: Tensor, filler: float = float("-inf")) -> Tensor:
    """`[n, V]` as `[n, chunks, CHUNK]`; a last chunk that is not full is filled up."""
    missing = -rows.shape[-1] % CHUNK
    if missing:
        rows = pad(rows, (0, missing), value=filler)
    return rows.view(len(rows), -1, CHUNK)


def chunk_peaks(rows: Tensor) -> Tensor:
    """The largest value of every chunk, float32 `[n, chunks]`; NaN where a chunk has one."""
    if rows.device.type != "cpu":
        return in_chunks(rows).amax(-1).float()
    peaks = torch.empty(len(rows), -(-rows.shape[-1] // CHUNK))
    for row in range(len(rows)):  # one row in float32 fits a core's cache
        torch.amax(in_chunks(rows[row : row + 1].float()), -1, out=peaks[row : row + 1])
    return peaks


def first_best(rows: Tensor, peaks: Tensor) -> Tensor:
    """The first id with the largest value of each row, `[n]`."""
    chunks = peaks.argmax(-1)
    inside = _take(rows, chunks[:, None])[:, 0].float().argmax(-1)
    return chunks * CHUNK + inside


def largest(rows: Tensor, peaks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their ids, `[n, count]` each, largest first.

    They lie in the `count` chunks with the largest peaks: any other chunk's best is below `count` values."""
    count = min(count, rows.shape[-1])
    chunks = peaks.topk(min(count, peaks.shape[-1])).indices
    values, places = _take(rows, chunks).flatten(1).topk(count)
    return values, chunks.gather(-1, places // CHUNK) * CHUNK + places % CHUNK


def _take(rows: Tensor, chunks: Tensor) -> Tensor:
    """Some chunks of each row: `[n, V]`, `[n, k]` -> `[n, k, CHUNK]`."""
    return in_chunks(rows)[torch.arange(len(rows), device=rows.device)[:, None], chunks]
