"""What an operator may do to adapters, whatever the route's shape: registry and engine brought into line.

The order is always: the engine proves that it can serve a revision, then the name moves in the registry, then engine
and workers follow. So no request ever finds a name that means nothing.
"""

import asyncio
import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.api.serving import Serving
from server.engine.messages import AdapterInfo
from server.errors import Conflict, InvalidRequest, ModelNotFound, QloopError
from server.store.adapter_import import PathRefused, import_adapter
from server.store.names import ModelId, NameRefused, parse_model_id
from server.store.registry import AdapterEntry, Moved, NotProved, RegistryError, UnknownAdapter

PINNED, STATE = "pinned", "state"


class AdapterAdmin:
    """All methods raise QloopError."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._client = serving.client
        self._registry = serving.registry

    async def load(self, model_id: ModelId, *, pin: bool | None = None) -> AdapterInfo:
        """A published revision; without one, what the name means in the registry."""
        return await self._client.load_adapter(model_id.name, model_id.revision, pin=pin)

    async def add(self, path: str, name: str, *, pin: bool | None = None, promote: bool = True) -> AdapterInfo:
        """Import a folder. What the engine refuses leaves nothing behind."""
        serving, model = self._serving, self._serving.model
        if name == model.name:
            raise InvalidRequest(f"{name!r} is the base model's name.", param="name", code="invalid_value")
        roots = serving.settings.adapter_roots
        with _as_api_errors("path"):
            imported = await asyncio.to_thread(
                import_adapter, self._registry, Path(path), name, roots, model.name, model.weights_hash
            )
        revision = imported.entry.revision
        try:
            adapter = await self._client.load_adapter(name, revision, pin=pin)
        except QloopError as error:
            if imported.is_new and error.code == "invalid_adapter":
                with contextlib.suppress(RegistryError):
                    await asyncio.to_thread(self._registry.remove, name, revision)
            raise
        return await self._move(name, revision) if promote else adapter

    async def unload(self, model_id: ModelId, *, cancel: bool = False) -> list[AdapterInfo]:
        return await self._client.unload_adapter(model_id.name, model_id.revision, cancel=cancel)

    async def promote(self, name: str, revision: str, *, force: str | None = None) -> AdapterInfo:
        await self._client.load_adapter(name, revision)
        return await self._move(name, revision, force)

    async def rollback(self, name: str) -> AdapterInfo:
        """One step back; a second call goes two."""
        with _as_api_errors("name"):
            revision = (await asyncio.to_thread(self._registry.previous, name)).revision
        await self._client.load_adapter(name, revision)
        with _as_api_errors("name"):
            await asyncio.to_thread(self._registry.rollback, name, revision)
        return await self._client.load_adapter(name)

    async def list(self) -> dict[str, Any]:
        """Everything published, and what the engine makes of it."""
        states = await self._client.adapter_states()
        entries = await asyncio.to_thread(self._registry.entries)
        served = {adapter.id: adapter for adapter in self._client.adapters}
        rows = []
        for entry in entries:
            row = self.card(served.get(entry.id) or entry)
            if entry.id in states.unloading:
                row[STATE] = "unloading"
            elif entry.id in states.refused:
                row |= {STATE: "refused", "error": states.refused[entry.id]}
            elif entry.id in served:
                row[STATE] = "loaded" if entry.id in states.loaded else "idle"
            rows.append(row)
        return {
            "object": "list",
            "data": rows,
            "max_loaded": states.max_loaded,
            "num_loaded": len(states.loaded),
            "engine": await self._engine_facts(),
        }

    async def _engine_facts(self) -> dict[str, Any]:
        """What an adapter must fit: `python -m trainer verify` compares it before and after training."""
        model, text = self._serving.model, self._serving.text
        ranks = (self._serving.settings.max_adapter_rank, model.max_adapter_rank)
        return {
            "backend": model.backend,
            "dtype": model.dtype,
            "model": model.name,
            "max_adapter_rank": min((rank for rank in ranks if rank), default=None),
            "weights_hash": model.weights_hash,
            "stop_token_ids": model.stop_token_ids,
            **asdict(await asyncio.to_thread(lambda: text.identity)),
        }

    def card(self, adapter: AdapterInfo | AdapterEntry) -> dict[str, Any]:
        """As the API shows it: served, or only published."""
        is_served = isinstance(adapter, AdapterInfo)
        card = adapter if isinstance(adapter, AdapterInfo) else adapter.card
        return {
            "id": adapter.id,
            "object": "adapter",
            "name": adapter.name,
            "revision": adapter.revision,
            STATE: "loaded" if is_served else "published",
            "current": adapter.is_current,
            PINNED: isinstance(adapter, AdapterInfo) and adapter.is_pinned,
            "method": card.method,
            "rank": card.rank,
            "base": adapter.base if isinstance(adapter, AdapterInfo) else adapter.card.base_model,
            "created": card.created,
            "scores": card.scores,
            "error": None,
        }

    async def _move(self, name: str, revision: str, force: str | None = None) -> AdapterInfo:
        with _as_api_errors("name"):
            await asyncio.to_thread(self._registry.promote, name, revision, force=force)
        return await self._client.load_adapter(name)


def model_id_of(text: str, param: str) -> ModelId:
    """Raises InvalidRequest."""
    try:
        return parse_model_id(text)
    except NameRefused as error:
        raise InvalidRequest(f"{error}.", param=param, code="invalid_value") from None


@contextlib.contextmanager
def _as_api_errors(param: str) -> Any:
    try:
        yield
    except UnknownAdapter as error:
        raise ModelNotFound(f"{error}.", param=param) from None
    except NotProved as error:
        cure = "Publish it with a report that passes, or promote it with a reason in 'force'."
        raise Conflict(f"{error}. {cure}", param="force", code="not_proved") from None
    except Moved as error:
        raise Conflict(f"{error}.", param=param, code="adapter_moved") from None
    except PathRefused as error:
        raise InvalidRequest(f"{error}.", param=param, code="path_not_allowed") from None
    except RegistryError as error:
        raise InvalidRequest(f"{error}.", param=param, code="invalid_adapter") from None
