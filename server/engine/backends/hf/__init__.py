"""Models of the transformers library, with continuous batching of our own."""

from server.engine.backends.hf.backend import HfBackend
from server.engine.backends.hf.options import HfOptions

__all__ = ["HfBackend", "HfOptions"]
