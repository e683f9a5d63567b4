"""NEFTune: noise on the embeddings of training text (Jain et al. 2023, arXiv:2310.05914).

The noise of a text depends on that text's own length, also when it is padded or shares its row with others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds uniform noise of up to alpha / sqrt(length x width) to each embedding while `for_lengths` is entered."""

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: Tensor | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def for_lengths(self, lengths: Tensor) -> Iterator[None]:
        """`lengths` [rows, length]: for each token the length of its text, 0 for padding."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        lengths = self._lengths
        if lengths is None or not module.training or embedded.shape[:2] != lengths.shape:
            return embedded
        size = self._alpha / torch.sqrt(lengths.clamp(min=1) * embedded.shape[-1])
        noise = torch.empty_like(embedded).uniform_(-1.0, 1.0)
        return embedded + noise * size.unsqueeze(-1).to(embedded.dtype)
