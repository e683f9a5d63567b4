"""The model as the step loop sees it: a batch in, logits out. Two ways of computing, one contract.

`fast.py` computes Llama-shaped decoders itself; `generic.py` runs the model's own code. Both put every linear map into
a `Projection`, so that adapters act in one place.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from server.engine.backends.hf.batch import Batch
from server.engine.backends.hf.kv_store import KvShape
from server.engine.backends.hf.projection import Projection


class Network(Protocol):
    @property
    def shape(self) -> KvShape: ...

    @property
    def projections(self) -> Mapping[str, Projection]:
        """By the module's name in the transformers model; fused ones under several names."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[W, V]` after the batch's wanted tokens. Writes the KV cells of all its tokens."""

    def embed_virtual(self, embeddings: Tensor, batch: Batch) -> None:
        """Write the KV cells of `[n, hidden]` input embeddings, which stand in for the batch's tokens."""
