"""The one interface between the engine's core and whatever computes tokens.

A backend is single-threaded: every method is called from the core's compute thread only. It owns scheduling,
KV memory and adapters' weights, and knows nothing about sockets, workers or text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from server.engine.messages import AdapterInfo, EngineStats, Generate, ModelInfo, SequenceOutput


class RequestRefused(Exception):
    """Admission says no. `code` and `param` travel to the worker in `Rejected`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def unheard(phase: str) -> None:
    """For loads that nobody watches."""


class Backend(Protocol):
    def load(self, enter: Callable[[str], None] = unheard) -> ModelInfo:
        """Load weights; blocking. `enter` hears what is being done. Raises ConfigError, with a cure, for a model that
        cannot be served."""

    def check(self, request: Generate) -> None:
        """Raise RequestRefused if this request could never run here (too long, unknown adapter, bad ids)."""

    def add(self, request: Generate) -> None:
        """Queue a checked request: n sequences, waiting until memory and a slot are free.

        Raises RequestRefused where only now it shows that it cannot run; nothing of it is left then.
        """

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Free the request's sequences (or one choice) at once; no output of them comes any more, not even of
        those that have just finished. Unknown ids are ignored."""

    def step(self) -> list[SequenceOutput]:
        """Advance: at most one new token per running sequence. May return nothing (pacing, prefill).

        A finished sequence has already been freed when its last output is returned.
        """

    @property
    def has_work(self) -> bool:
        """True while any sequence is queued or running."""

    @property
    def stats(self) -> EngineStats: ...

    def load_adapter(self, adapter: AdapterInfo, path: Path) -> None:
        """Load a revision's folder. Raises AdapterError naming the fault; the backend then goes on unchanged."""

    def unload_adapter(self, adapter_id: str) -> None:
        """Drop an adapter's weights and return their memory. The core has made sure nothing uses it."""

    def close(self) -> None: ...


@runtime_checkable
class AdapterProbe(Protocol):
    """What a backend may offer besides: a last test of an adapter that has just been loaded for the first time."""

    def probe_adapter(self, adapter_id: str) -> bool:
        """Compute a few tokens with and without it. False: not done yet, as others compute, too; ask again.

        Raises AdapterError when the numbers are not finite, or equal.
        """


@runtime_checkable
class Interruptible(Protocol):
    """What a backend may offer besides, when its `step` waits for other processes."""

    def interrupt(self) -> None:
        """From any thread: let a `step` that waits, or the next one that would, return at once."""


@runtime_checkable
class Metered(Protocol):
    """What a backend may offer besides, when a library under it counts for itself."""

    def metrics(self) -> str:
        """Prometheus text, under the library's own names."""


class AdapterError(Exception):
    """An adapter folder that this backend cannot serve, and why."""


def not_a_number() -> AdapterError:
    """For a probe whose logits are not finite."""
    return AdapterError("with it the model's output is not a number. The training run failed; train again.")


def no_effect(dtype: str) -> AdapterError:
    """For a probe that computes what the base does."""
    return AdapterError(
        f"it has no effect: in {dtype} the model computes the same with and without it. "
        "Train it longer or with a higher learning rate."
    )
