"""The API, the engine's socket and core in this process, with a backend that a test looks into."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from server.app import create_app
from server.engine.adapter_calls import EVERYONE
from server.engine.adapters import AdapterTable
from server.engine.backends.fake import FakeBackend, FakeOptions
from server.engine.connections import EngineSocket, append
from server.engine.core import Core, Delivery, Stop
from server.engine.messages import PROTOCOL_VERSION, EngineStats, Generate, ModelInfo, Ready, SequenceOutput
from server.settings import Settings
from server.store.registry import Registry
from tests.services import MODEL

MAX_NUM_SEQS = 8


class OpenBackend(FakeBackend):
    """The fake one, but it refuses no parameter, keeps every request, and gives a search's beams all at once."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__(FakeOptions(model_folder, MODEL, max_num_seqs=MAX_NUM_SEQS))
        self.requests: list[Generate] = []
        self.num_cached_tokens: int | None = None  # what choice 0 reports; each later one reports one more
        self._beams: dict[str, dict[int, SequenceOutput]] = {}

    def load(self) -> ModelInfo:
        self._model = msgspec.structs.replace(super().load(), unsupported_params=())
        return self._model

    def add(self, request: Generate) -> None:
        self.requests.append(request)
        super().add(request)

    def step(self) -> list[SequenceOutput]:
        return [news for output in super().step() for news in self._news(output)]

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats, cached_tokens_total=12_345, num_preempted=67)

    def _news(self, output: SequenceOutput) -> list[SequenceOutput]:
        if output.num_cached_tokens is not None and self.num_cached_tokens is None:
            output.num_cached_tokens = None
        elif output.num_cached_tokens is not None and self.num_cached_tokens is not None:
            output.num_cached_tokens = self.num_cached_tokens + output.index
        request = next(r for r in self.requests if r.request_id == output.request_id)
        if request.params.num_beams == 1:
            return [output]
        beams = self._beams.setdefault(request.request_id, {})
        if output.index in beams:
            append(beams[output.index], output)
        else:
            beams[output.index] = output
        has_ended = len(beams) == request.n and all(beam.finish_reason is not None for beam in beams.values())
        return [beams[index] for index in range(request.n)] if has_ended else []


@contextlib.asynccontextmanager
async def near_server(model_folder: Path, **settings: Any) -> AsyncIterator[tuple[OpenBackend, httpx.AsyncClient]]:
    """The backend, and a client that has no key."""
    backend, loop = OpenBackend(model_folder), asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(prefix="qloop-") as folder:
        home = Path(folder)
        table = AdapterTable(Registry(home / "adapters"), backend.load())
        ready = Ready(PROTOCOL_VERSION, 1, backend.model, [], table.version, False)
        engine = EngineSocket(lambda: ready)

        def deliver(deliveries: list[Delivery]) -> None:
            loop.call_soon_threadsafe(engine.deliver, deliveries)

        engine.core = Core(backend, table, max_queue=16, deliver=deliver)
        thread = threading.Thread(target=engine.core.run, daemon=True)
        thread.start()
        app = create_app(Settings(home=home, **settings))
        listener = await engine.listen(app.state.serving.settings.socket_path)
        try:
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url="http://near", timeout=30) as client:
                    yield backend, client
        finally:
            engine.core.post(EVERYONE, Stop())
            await asyncio.to_thread(thread.join, 10)
            listener.close()
            await asyncio.sleep(0)  # the core's last deliveries
        assert not thread.is_alive()
