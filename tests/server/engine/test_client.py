"""`EngineClient` against a real engine, and against peers that misbehave."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.engine.client import EngineClient, Generation
from server.engine.messages import (
    PROTOCOL_VERSION,
    Accepted,
    FinishReason,
    Generate,
    Hello,
    Outputs,
    Ready,
    Refused,
    SequenceOutput,
    ToEngine,
)
from server.engine.transport import FrameProtocol
from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    QloopError,
)
from server.store.registry import Registry
from tests.conftest import StartService
from tests.server.engine.adapters import publish
from tests.server.engine.wire import ask, connect
from tests.services import Service

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def engine(start_session_service: StartService) -> Service:
    """50 tokens a second; 4 sequences run and 4 wait."""
    return start_session_service(workers=0, fake_tokens_per_s=50, max_num_seqs=4, max_queue=4)


@contextlib.asynccontextmanager
async def connected(path: Path, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(path, **options)
    client.start()
    try:
        await client.wait_ready(20)
        yield client
    finally:
        await client.close()


@pytest.fixture
async def client(engine: Service) -> AsyncIterator[EngineClient]:
    async with connected(engine.socket_path, role="worker") as client:
        yield client
        await idle(client)


async def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def idle(client: EngineClient) -> None:
    """The engine is empty, by a heartbeat that is newer than this call."""
    steps = client.stats
    await eventually(lambda: client.stats is not steps and client.stats.num_running + client.stats.num_waiting == 0)


async def read(generation: Generation) -> list[SequenceOutput]:
    items: list[SequenceOutput] = []
    while not generation.is_finished:
        items += await generation.next()
    return items


async def test_outputs_come_whole_and_in_order(client: EngineClient) -> None:
    generation = await client.generate(ask("1", PROMPT, n=2, max_tokens=7, ignore_eos=True))
    items = await read(generation)
    for index in (0, 1):
        ids = [i for item in items if item.index == index for i in item.new_token_ids]
        assert ids == (PROMPT * 4)[index : index + 7]


async def test_many_requests_on_one_connection(client: EngineClient) -> None:
    generations = [await client.generate(ask(str(i), [i + 1], max_tokens=3, ignore_eos=True)) for i in range(8)]
    for number, items in enumerate(await asyncio.gather(*map(read, generations))):
        assert [i for item in items for i in item.new_token_ids] == [number + 1] * 3


@pytest.mark.parametrize(
    ("request_", "error", "code"),
    [
        (ask("1", [10**6]), InvalidRequest, "invalid_request"),
        (ask("1", PROMPT, max_tokens=10**6), InvalidRequest, "context_length_exceeded"),
        (ask("1", PROMPT, n=9), InvalidRequest, "invalid_request"),
        (msgspec.structs.replace(ask("1", PROMPT), adapter="a@000000000000"), ModelNotFound, "model_not_found"),
    ],
)
async def test_refusals(client: EngineClient, request_: Generate, error: type[QloopError], code: str) -> None:
    with pytest.raises(error) as caught:
        await client.generate(request_)
    assert caught.value.code == code


async def test_a_full_queue_refuses_and_the_accepted_go_on(client: EngineClient) -> None:
    accepted = [await client.generate(ask(str(i), PROMPT, n=2, max_tokens=40, ignore_eos=True)) for i in range(4)]
    with pytest.raises(Overloaded) as caught:
        await client.generate(ask("more", PROMPT))
    assert caught.value.retry_after_s == 1
    for items in await asyncio.gather(*map(read, accepted)):
        assert sum(len(item.new_token_ids) for item in items) == 80


async def test_cancel_frees_running_and_queued_sequences(client: EngineClient) -> None:
    generations = [await client.generate(ask(str(i), PROMPT, n=4, max_tokens=400, ignore_eos=True)) for i in range(2)]
    await eventually(lambda: (client.stats.num_running, client.stats.num_waiting) == (4, 4))
    for generation in generations:
        generation.cancel()
        generation.cancel()
    await idle(client)


async def test_cancelling_the_task_that_waits_for_admission_aborts(engine: Service) -> None:
    async with connected(engine.socket_path) as client:
        tasks = [asyncio.create_task(client.generate(ask(f"t{i}", PROMPT, max_tokens=400))) for i in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        await idle(client)


async def test_aborting_one_choice_leaves_the_others(client: EngineClient) -> None:
    generation = await client.generate(ask("1", PROMPT, n=2, max_tokens=8, ignore_eos=True))
    await generation.next()
    generation.abort(1)
    items = await read(generation)
    assert [item.finish_reason is not None for item in items if item.index == 0][-1]


async def test_on_news_is_called_as_outputs_come_and_at_the_end(client: EngineClient) -> None:
    generation = await client.generate(ask("1", PROMPT, max_tokens=8, ignore_eos=True))
    news = asyncio.Event()
    taken = []
    generation.on_news = news.set
    while not generation.is_finished:
        taken += generation.take()
        if not generation.is_finished:
            await asyncio.wait_for(news.wait(), 10)
            news.clear()
    assert sum(len(output.new_token_ids) for output in taken) == 8
    assert generation.take() == []


async def test_an_end_that_comes_together_with_outputs_is_heard(client: EngineClient) -> None:
    """One wake-up for both, outputs that go on: a caller that left would be generated for to the last token."""
    generation = await client.generate(ask("1", PROMPT, max_tokens=400, ignore_eos=True))
    news = asyncio.Event()
    generation.on_news = news.set
    output = SequenceOutput("1", 0, [5], 1)

    async def consume() -> None:
        while True:
            generation.take()
            await news.wait()
            news.clear()

    consuming = asyncio.create_task(consume())
    await asyncio.sleep(0)
    generation.push(output)
    generation.fail(QloopError("gone"))
    generation.push(output)
    with pytest.raises(QloopError, match="gone"):
        await asyncio.wait_for(consuming, 5)
    generation.cancel()


async def test_an_error_of_one_choice_frees_the_others(client: EngineClient) -> None:
    generation = await client.generate(ask("1", PROMPT, n=2, max_tokens=400, ignore_eos=True))
    client.received(Outputs([SequenceOutput("1", 1, [], 0, FinishReason.ERROR, error="not a number")]))
    with pytest.raises(InternalError, match="not a number"):
        await read(generation)
    await asyncio.wait_for(idle(client), 4)  # the other one would run for eight seconds


async def test_an_answer_that_is_complete_stays_so_when_the_engine_goes(client: EngineClient) -> None:
    generation = await client.generate(ask("1", PROMPT, max_tokens=2, ignore_eos=True))
    await read(generation)
    generation.fail(QloopError("gone"))
    assert generation.is_finished and generation.take() == []


async def test_a_deadline(client: EngineClient) -> None:
    request = msgspec.structs.replace(ask("1", PROMPT, n=2, max_tokens=400, ignore_eos=True), deadline_s=0.1)
    with pytest.raises(DeadlineExceeded):
        await read(await client.generate(request))


async def test_close_ends_what_still_waits(engine: Service) -> None:
    async with connected(engine.socket_path) as client:
        generation = await client.generate(ask("1", PROMPT, max_tokens=400, ignore_eos=True))
        reading = asyncio.create_task(read(generation))
        await asyncio.sleep(0)
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(reading, 5)
    with pytest.raises(EngineUnavailable):
        await client.generate(ask("2", PROMPT))


async def test_no_engine(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none.sock")
    client.start()
    with pytest.raises(EngineUnavailable, match="No engine answered"):
        await client.wait_ready(0.2)
    with pytest.raises(EngineUnavailable):
        await client.generate(ask("1", PROMPT))
    await client.close()


async def test_adapters_load_and_unload(client: EngineClient, engine: Service, tmp_path: Path) -> None:
    entry = publish(Registry(engine.home / "adapters"), tmp_path / "a", "xiaozhi")
    assert (await client.load_adapter("xiaozhi")).id == entry.id
    assert [adapter.id for adapter in client.adapters] == [entry.id]
    assert (await client.load_adapter("xiaozhi", entry.revision)).id == entry.id  # twice is once
    request = ask("1", PROMPT, max_tokens=20, ignore_eos=True)
    generation = await client.generate(msgspec.structs.replace(request, adapter=entry.id))
    unloading = asyncio.create_task(client.unload_adapter("xiaozhi"))
    items = await read(generation)
    assert sum(len(item.new_token_ids) for item in items) == 20
    assert [adapter.id for adapter in await unloading] == [entry.id] and client.adapters == []
    with pytest.raises(ModelNotFound):
        await client.unload_adapter("xiaozhi")
    with pytest.raises(ModelNotFound):
        await client.generate(msgspec.structs.replace(request, adapter=entry.id))
    with pytest.raises(ModelNotFound, match="nobody"):
        await client.load_adapter("nobody")


async def test_draining_engines_refuse_and_restarted_ones_do_not(start_service: StartService) -> None:
    service = start_service(workers=0, fake_tokens_per_s=50)
    async with connected(service.socket_path) as client, connected(service.socket_path, role="supervisor") as boss:
        generation = await client.generate(ask("1", PROMPT, max_tokens=30, ignore_eos=True))
        boss.start_drain()
        await eventually(lambda: client.is_draining)
        assert not client.is_ready and client.is_connected
        with pytest.raises(Draining) as caught:
            await client.generate(ask("2", PROMPT))
        assert caught.value.retry_after_s is not None
        assert sum(len(item.new_token_ids) for item in await read(generation)) == 30
        await eventually(lambda: boss.heard_since_drain)


async def test_a_killed_engine_ends_requests_and_calls(start_service: StartService) -> None:
    service = start_service(workers=0, fake_tokens_per_s=50)
    async with connected(service.socket_path) as client:
        generation = await client.generate(ask("1", PROMPT, max_tokens=400, ignore_eos=True))
        with connect(service.socket_path) as silent_worker:  # never acknowledges: the call stays open
            publish(Registry(service.home / "adapters"), service.home / "a", "x")
            call = asyncio.create_task(client.load_adapter("x"))
            await generation.next()
            service.engine.kill()
            with pytest.raises(EngineUnavailable):
                await asyncio.wait_for(read(generation), 2)
            with pytest.raises(EngineUnavailable):
                await asyncio.wait_for(call, 2)
            assert silent_worker.is_closed()
        assert not client.is_ready and client.stats.num_running == 0


# --- peers that misbehave: a stand-in that speaks the wire, nothing of the client is replaced ---


class StandIn(FrameProtocol):
    """An engine that answers the greeting, and then as it was told."""

    greeting: list[msgspec.Struct]
    accepts: bool
    num_greeted = 0

    def __init__(self) -> None:
        super().__init__(ToEngine)

    def message_received(self, message: Any) -> None:
        if isinstance(message, Hello):
            type(self).num_greeted += 1
            for answer in self.greeting:
                self.send(answer)
        elif isinstance(message, Generate) and self.accepts:
            self.send(Accepted(message.request_id, 1))

    def closed(self, reason: str | None) -> None:
        pass


@pytest.fixture
def stand_in_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qloop-") as folder:
        yield Path(folder) / "engine.sock"


async def serve(path: Path, greeting: list[msgspec.Struct], accepts: bool = True) -> tuple[type[StandIn], Any]:
    kind = type("Peer", (StandIn,), {"greeting": greeting, "accepts": accepts, "num_greeted": 0})
    return kind, await asyncio.get_running_loop().create_unix_server(kind, str(path))


@pytest.fixture
async def ready(engine: Service) -> Ready:
    with connect(engine.socket_path, role=None) as wire:
        return wire.greet()


async def test_a_refusal_is_said_once_and_tried_again(
    stand_in_path: Path, caplog: pytest.LogCaptureFixture, ready: Ready
) -> None:
    _, server = await serve(stand_in_path, [Refused(9, "speak 9")])
    client = EngineClient(stand_in_path)
    client.start()
    with pytest.raises(EngineUnavailable, match="speak 9"):
        await client.wait_ready(10)
    with pytest.raises(EngineUnavailable, match="speak 9"):
        await client.generate(ask("1", PROMPT))
    assert [record.levelname for record in caplog.records if "speak 9" in record.message] == ["ERROR"]
    await client.close()
    server.close()


async def test_an_engine_of_another_version_is_not_used(stand_in_path: Path, ready: Ready) -> None:
    other = msgspec.structs.replace(ready, protocol_version=PROTOCOL_VERSION + 1)
    _, server = await serve(stand_in_path, [other])
    client = EngineClient(stand_in_path)
    client.start()
    with pytest.raises(EngineUnavailable, match=f"{PROTOCOL_VERSION + 1}.*restart both"):
        await client.wait_ready(10)
    await client.close()
    server.close()


async def test_a_silent_engine_is_given_up(stand_in_path: Path, ready: Ready) -> None:
    """No heartbeat: requests end with an error, and the connection is made anew."""
    peer, server = await serve(stand_in_path, [ready])
    async with connected(stand_in_path, heartbeat_timeout_s=1.0) as client:
        generation = await client.generate(ask("1", PROMPT))
        with pytest.raises(EngineUnavailable, match="does not answer"):
            await asyncio.wait_for(read(generation), 5)
        await eventually(lambda: peer.num_greeted >= 2)
    server.close()


async def test_an_engine_that_never_admits(stand_in_path: Path, ready: Ready) -> None:
    _, server = await serve(stand_in_path, [ready], accepts=False)
    async with connected(stand_in_path, heartbeat_timeout_s=1.0) as client:
        waiting: Awaitable[Generation] = client.generate(ask("1", PROMPT))
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(waiting, 5)
    server.close()
