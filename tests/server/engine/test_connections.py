"""The engine's socket, spoken to in raw frames: greetings, garbage, slow readers, acknowledgements."""

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.engine.connections import append
from server.engine.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Accepted,
    AckAdapters,
    AdapterReply,
    Adapters,
    FinishReason,
    Heartbeat,
    Hello,
    LoadAdapter,
    Outputs,
    Refused,
    SequenceOutput,
    StartDrain,
    TokenLogprobs,
)
from server.engine.transport import encode_frame
from server.store.registry import Registry
from tests.conftest import StartService
from tests.models import write_fake_model
from tests.server.engine.adapters import publish
from tests.server.engine.wire import Wire, ask, connect, token_ids
from tests.services import ROOT, Service, wait_until

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An engine alone, as fast as it goes, with room for long answers."""
    model = write_fake_model(tmp_path_factory.mktemp("long") / "tiny", context=100_000)
    service = Service(model, workers=0, max_num_seqs=8).wait_ready()
    yield service
    service.stop()


@pytest.fixture(autouse=True)
def engine_goes_on(engine: Service) -> Iterator[None]:
    """Whatever one connection did, the engine serves the next, and nothing of the old one is left running."""
    yield
    with connect(engine.socket_path) as wire:
        wire.send(ask("after", PROMPT, max_tokens=3, ignore_eos=True))
        assert wire.receive_until(lambda m: isinstance(m, Accepted)).request_id == "after"
        wire.receive_until(lambda m: isinstance(m, Outputs) and m.items[-1].finish_reason is not None)
        wire.receive_until(lambda m: isinstance(m, Heartbeat) and m.stats.num_running + m.stats.num_waiting == 0)


def test_ready_says_what_is_served(engine: Service) -> None:
    with connect(engine.socket_path, role=None) as wire:
        ready = wire.greet()
    assert (ready.protocol_version, ready.pid, ready.is_draining) == (PROTOCOL_VERSION, engine.engine.pid, False)
    assert (ready.model.backend, ready.model.max_num_seqs) == ("fake", 8)


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 0, -1])
def test_another_protocol_version_is_refused_loudly(engine: Service, version: int) -> None:
    with connect(engine.socket_path, role=None) as wire:
        wire.send(Hello(version, "worker", 4711))
        refused = wire.receive()
        assert isinstance(refused, Refused) and refused.protocol_version == PROTOCOL_VERSION
        assert str(version) in refused.message and "restart" in refused.message
        assert wire.is_closed()
    wait_until(lambda: "process 4711" in engine.log, 5, "the refusal in the engine's log")


HELLO = encode_frame(Hello(PROTOCOL_VERSION, "worker", 1))
GARBAGE = {
    "not a frame": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "not messagepack": struct.pack(">I", 3) + b"\xc1\xc1\xc1",
    "an unknown message": HELLO + struct.pack(">I", 4) + b"\xa3abc",
    "too large": HELLO + struct.pack(">I", MAX_FRAME_BYTES + 1),
    "no greeting": encode_frame(ask("x", PROMPT)),
    "two greetings": HELLO * 2,
    "a worker that drains": HELLO + encode_frame(StartDrain()),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_closes_that_connection_only(engine: Service, data: bytes) -> None:
    with connect(engine.socket_path) as other, connect(engine.socket_path, role=None) as wire:
        other.send(ask("other", PROMPT, max_tokens=2_000, ignore_eos=True))
        wire.socket.sendall(data)
        assert wire.is_closed()
        assert len(token_ids(other.read_answer("other"), "other")) == 2_000


def test_half_a_frame_and_gone(engine: Service) -> None:
    with connect(engine.socket_path) as wire:
        wire.socket.sendall(encode_frame(ask("x", PROMPT))[:-1])


def test_heartbeats_come_when_idle(engine: Service) -> None:
    with connect(engine.socket_path) as wire:
        beats = [wire.receive_until(lambda m: isinstance(m, Heartbeat)) for _ in range(2)]
    assert all(beat.stats.kv_tokens_total > 0 for beat in beats)


def test_a_slow_reader_gets_everything_merged(engine: Service) -> None:
    """It does not read until all is computed: the rest is held as one output per sequence, not as a queue."""
    num, size = 30_000, 8
    process = psutil.Process(engine.engine.pid)
    with connect(engine.socket_path) as slow, connect(engine.socket_path) as watch:
        before = process.memory_info().rss
        slow.send(ask("slow", PROMPT, n=size, max_tokens=num, ignore_eos=True))
        watch.receive_until(lambda m: isinstance(m, Heartbeat) and m.stats.num_running == size, 30)
        watch.receive_until(lambda m: isinstance(m, Heartbeat) and m.stats.num_running == 0, 90)
        grown = process.memory_info().rss - before
        messages = slow.read_answer("slow", n=size)
    for index in range(size):
        assert token_ids(messages, "slow", index) == (PROMPT * num)[index % 5 :][:num]
    frames = [m for m in messages if isinstance(m, Outputs)]
    assert len(frames) < num / 4  # it got far fewer frames than there were steps
    assert grown < 48 * 1024 * 1024  # 240,000 ids; unmerged outputs would take some ten times that


def test_appended_outputs_lose_nothing() -> None:
    logprobs = [TokenLogprobs(i, -0.1, 1, [], [], []) for i in range(3)]
    held = SequenceOutput("a", 0, [1], 1, None, None, logprobs[:1], [None])
    append(held, SequenceOutput("a", 0, [2, 3], 3, FinishReason.STOP, 3, logprobs[1:]))
    assert held == SequenceOutput("a", 0, [1, 2, 3], 3, FinishReason.STOP, 3, logprobs, [None])
    append(held, SequenceOutput("a", 0, [], 0, FinishReason.ERROR, error="broken"))
    assert (held.error, held.num_tokens, held.new_token_ids) == ("broken", 3, [1, 2, 3])


def test_a_load_is_answered_when_every_worker_has_acknowledged(engine: Service, tmp_path: Path) -> None:
    publish(Registry(engine.home / "adapters"), tmp_path / "a", "acked")
    with connect(engine.socket_path) as first, connect(engine.socket_path) as second:
        with connect(engine.socket_path, role="client") as caller, connect(engine.socket_path) as leaver:
            caller.send(LoadAdapter("call", "acked"))
            versions = [w.receive_until(lambda m: isinstance(m, Adapters)).version for w in (first, second, leaver)]
            first.send(AckAdapters(versions[0]))
            caller.receive_until(lambda m: isinstance(m, Adapters))
            second.send(AckAdapters(versions[1] - 1))  # an older list does not count
            beats = [caller.receive_until(lambda m: not isinstance(m, Adapters)) for _ in range(2)]
            assert all(isinstance(beat, Heartbeat) for beat in beats)
            leaver.socket.close()  # who is gone need not know
            second.send(AckAdapters(versions[1]))
            reply = caller.receive_until(lambda m: isinstance(m, AdapterReply))
            assert (reply.call_id, reply.error) == ("call", None)
        ready = _greeted(engine)
        assert [adapter.name for adapter in ready.adapters] == ["acked"] and ready.adapters_version == versions[0]


def _greeted(engine: Service) -> Any:
    with connect(engine.socket_path, role=None) as wire:
        return wire.greet()


def test_many_clients_at_once(engine: Service) -> None:
    failures: list[BaseException] = []

    def talk(number: int) -> None:
        try:
            with connect(engine.socket_path) as wire:
                wire.send(ask(f"c{number}", [number + 1], max_tokens=50, ignore_eos=True))
                assert token_ids(wire.read_answer(f"c{number}"), f"c{number}") == [number + 1] * 50
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_socket_is_the_owners_alone(engine: Service) -> None:
    assert stat.S_IMODE(engine.socket_path.stat().st_mode) & 0o077 == 0


def _second_engine(engine: Service, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**engine.environment, "QLOOP_ENGINE_SOCKET": str(path)}
    command = [sys.executable, "-m", "server.engine"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_a_second_engine_on_the_same_socket_does_not_start(engine: Service) -> None:
    done = _second_engine(engine, engine.socket_path)
    assert done.returncode == 78 and "already listens" in done.stderr


def test_a_file_that_is_no_socket_is_left_alone(engine: Service, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("precious")
    done = _second_engine(engine, file)
    assert done.returncode == 78 and "no socket" in done.stderr
    assert file.read_text() == "precious"


def test_a_dead_engines_socket_is_taken_over(start_service: StartService) -> None:
    service = start_service(workers=0)
    path = service.home / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    process = subprocess.Popen(
        [sys.executable, "-m", "server.engine"],
        cwd=ROOT,
        env={**service.environment, "QLOOP_ENGINE_SOCKET": str(path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(path), 60, "an engine on the stale socket")
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists() and os.path.isdir(service.home)


def _answers(path: Path) -> bool:
    try:
        wire = Wire(path)
    except OSError:
        return False
    wire.greet()
    wire.socket.close()
    return True
