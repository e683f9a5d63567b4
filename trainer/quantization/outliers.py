"""Which layers are hard to quantize: a few inputs or weights far larger than the rest take all of int8's range.

As in LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): inputs beyond 6 are its outliers, computed in 16 bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

THRESHOLD = 6.0
LEVELS = 127
SPREAD_ROWS = 64  # of all sequences together; one row of each comes on top


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Of one linear map, over all tokens seen; `int8_error` over a few of every sequence."""

    name: str
    largest_input: float  # max |x|
    input_ratio: float  # the largest input feature's max |x| over the median feature's
    num_outliers: int  # input features that exceed THRESHOLD
    weight_ratio: float  # max |w| over the weights' root mean square
    int8_error: float  # max |error of an output| over the outputs' root mean square, all in int8


class _Seen:
    """What went through one layer. Of each sequence `spread` tokens' inputs are kept, evenly spaced, and those of the
    token with the largest one, where int8 errs most."""

    def __init__(self, spread: int) -> None:
        self.spread = spread
        self.largest: torch.Tensor | None = None  # [in_features]
        self.kept: list[torch.Tensor] = []  # each [tokens, in_features]

    def add(self, inputs: torch.Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        sizes = rows.abs()
        most = sizes.amax(0)
        self.largest = most if self.largest is None else torch.maximum(self.largest, most)
        places = torch.linspace(0, len(rows) - 1, min(self.spread, len(rows)), device=rows.device).round().long()
        self.kept.append(rows[torch.unique(torch.cat([places, sizes.amax(1).argmax()[None]]))])


def find_outliers(model: Any, sequences: Sequence[Sequence[int]]) -> list[Layer]:
    """Every nn.Linear of a float model, the one with the most uneven inputs first. `sequences` are token ids."""
    with _watched(model, max(1, SPREAD_ROWS // max(1, len(sequences)))) as seen, torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    parts = dict(model.named_modules())
    layers = [_layer(name, parts[name].weight, found) for name, found in seen.items() if found.largest is not None]
    return sorted(layers, key=lambda layer: -layer.input_ratio)


@contextmanager
def _watched(model: Any, spread: int) -> Iterator[dict[str, _Seen]]:
    seen: dict[str, _Seen] = {}
    handles = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            found = seen[name] = _Seen(spread)
            handles.append(part.register_forward_pre_hook(lambda _, inputs, found=found: found.add(inputs[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str, weight: torch.Tensor, seen: _Seen) -> Layer:
    assert seen.largest is not None
    matrix, inputs = weight.detach().float(), torch.cat(seen.kept)
    exact = inputs @ matrix.T
    error = (exact - _rounded_rows(inputs) @ _rounded_rows(matrix).T).abs().max()
    return Layer(
        name=name,
        largest_input=float(seen.largest.max()),
        input_ratio=float(seen.largest.max() / seen.largest.median().clamp_min(1e-12)),
        num_outliers=int((seen.largest > THRESHOLD).sum()),
        weight_ratio=float(matrix.abs().max() / matrix.square().mean().sqrt().clamp_min(1e-12)),
        int8_error=float(error / exact.square().mean().sqrt().clamp_min(1e-12)),
    )


def _rounded_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Each row scaled by its largest magnitude to [-127, 127], rounded, and back: Linear8bitLt without outliers."""
    scale = matrix.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return (matrix * (LEVELS / scale)).round().clamp(-LEVELS, LEVELS) * (scale / LEVELS)
