"""vLLM behind `base.Backend`.

vllm itself is imported in `VllmBackend.load`: that takes seconds. It reads the environment; `settings.prepare_vllm`
comes before.
"""

from server.engine.backends.vllm.backend import VllmBackend
from server.engine.backends.vllm.options import VllmOptions

__all__ = ["VllmBackend", "VllmOptions"]
