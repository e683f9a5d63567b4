"""What every endpoint of a worker needs: the engine, the model's text side, and how API model ids map to adapters.

One per worker process. The text side (tokenizer and chat template) comes from the folder that the engine names,
so what is rendered here is always what the engine has loaded.
"""

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import server
from server.engine.client import EngineClient
from server.engine.messages import AdapterInfo, ModelInfo, Ready
from server.errors import ConfigError, EngineUnavailable, ModelNotFound
from server.settings import Settings
from server.store.home import Home
from server.store.registry import Registry
from server.text.identity import TextIdentity, identity_of, template_hash
from server.text.render import ChatRenderer
from server.text.sampling_defaults import sampling_defaults

log = logging.getLogger("qloop.worker")


@dataclass(frozen=True)
class TextSide:
    """A model folder as a worker uses it."""

    path: str
    renderer: ChatRenderer
    sampling_defaults: dict[str, Any]  # from generation_config.json, as vLLM takes them
    template_hash: str

    @cached_property
    def identity(self) -> TextIdentity:
        """Reads the tokenizer's file the first time."""
        return identity_of(Path(self.path), self.renderer)


@dataclass(frozen=True)
class Target:
    """What an API model id stands for right now."""

    model_id: str  # as it is reported back
    adapter: AdapterInfo | None

    @property
    def adapter_id(self) -> str | None:
        return self.adapter.id if self.adapter else None

    @property
    def num_virtual(self) -> int:
        return self.adapter.num_virtual if self.adapter else 0


class Serving:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = EngineClient(
            settings.socket_path,
            role="worker",
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
            on_ready=self._engine_ready,
        )
        self.registry = Registry(Home(settings.home).adapters)
        self.started = int(time.time())
        self._text: TextSide | None = None
        self._text_error: str | None = None
        self._loading: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self.client.is_ready and self._text is not None

    @property
    def why_not_ready(self) -> str:
        if self.client.is_draining:
            return "draining"
        if not self.client.is_connected:
            return self.client.refusal or "engine not running or still loading"
        return self._text_error or "loading the tokenizer"

    async def settle(self, patience_s: float) -> None:
        """Where an engine runs, or ran a moment ago, wait for it to be ready; returns at once when draining."""
        deadline = time.monotonic() + patience_s
        while not (self.is_ready or self.client.is_draining) and time.monotonic() < deadline:
            if not self.settings.socket_path.exists():
                return
            await asyncio.sleep(0.01)

    @property
    def text(self) -> TextSide:
        """Raises EngineUnavailable until the first engine has said which model it serves."""
        if self._text is None:
            raise EngineUnavailable(f"Not ready: {self.why_not_ready}.", retry_after_s=2)
        return self._text

    @property
    def model(self) -> ModelInfo:
        if self.client.model is None:
            raise EngineUnavailable(f"Not ready: {self.why_not_ready}.", retry_after_s=2)
        return self.client.model

    def resolve(self, model_id: str | None) -> Target:
        """The base model (also when none is named), `name` or `name@revision`. Raises ModelNotFound."""
        if model_id is None or model_id == self.model.name:
            return Target(self.model.name, None)
        for adapter in self.client.adapters:
            if model_id == adapter.id or (model_id == adapter.name and adapter.is_current):
                return Target(model_id, adapter)
        available = ", ".join(target.model_id for target in self.targets())
        raise ModelNotFound(
            f"The model {model_id!r} does not exist or is not loaded. Available: {available}.", param="model"
        )

    def targets(self) -> list[Target]:
        """Every id that `/v1/models` lists: the base, each adapter's name, and revisions that are not current."""
        adapters = [Target(a.name if a.is_current else a.id, a) for a in self.client.adapters]
        return [Target(self.model.name, None), *adapters]

    def fingerprint(self, target: Target) -> str:
        """OpenAI's `system_fingerprint`: same value, same weights, adapter, template and release."""
        model = self.model
        weights = (model.weights_hash, str(target.adapter_id))
        parts = (server.__version__, model.backend, model.dtype, *weights, self.text.template_hash)
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def _engine_ready(self, ready: Ready) -> None:
        if self._text is None or self._text.path != ready.model.path:
            self._loading = asyncio.create_task(self._load_text(Path(ready.model.path)))

    async def _load_text(self, folder: Path) -> None:
        try:
            self._text = await asyncio.to_thread(load_text, folder)
            self._text_error = None
        except ConfigError as error:
            self._text_error = str(error)
            log.error("%s", error)


def load_text(folder: Path) -> TextSide:
    """Raises ConfigError when the folder's tokenizer, template or generation_config.json is damaged."""
    defaults = sampling_defaults(folder)
    renderer = ChatRenderer.load(folder)
    return TextSide(str(folder), renderer, defaults, template_hash(renderer.template))
