"""The core, in this thread, with the real fake backend and without a socket."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.engine.adapter_calls import EVERYONE
from server.engine.adapters import AdapterTable
from server.engine.backends.fake import FakeBackend, FakeOptions
from server.engine.core import Core, Delivery, Disconnected, Stop
from server.engine.messages import (
    Abort,
    Accepted,
    AdapterReply,
    Adapters,
    Draining,
    FinishReason,
    Generate,
    Heartbeat,
    LoadAdapter,
    Outputs,
    Rejected,
    StartDrain,
    UnloadAdapter,
)
from server.store.registry import Registry
from tests.server.engine.adapters import publish
from tests.server.engine.wire import ask
from tests.services import wait_until

PROMPT = [5, 6, 7]


class Running:
    """A core whose loop runs in a thread; `said` is everything it delivered."""

    def __init__(self, model: Path, home: Path, core: dict[str, Any], **options: Any) -> None:
        self.backend = FakeBackend(FakeOptions(model, "tiny", max_num_seqs=2, **options))
        self.registry = Registry(home / "adapters")
        table = AdapterTable(self.registry, self.backend.load())
        self.said: list[Delivery] = []
        self.core = Core(self.backend, table, max_queue=2, deliver=self.said.extend, **core)
        self.core.restore_adapters()
        self.thread = threading.Thread(target=self.core.run, daemon=True)

    def to(self, connection: object, kind: type[msgspec.Struct] = msgspec.Struct) -> list[Any]:
        return [m for c, m in list(self.said) if c == connection and isinstance(m, kind)]

    def wait(self, condition: Callable[[], object]) -> None:
        wait_until(condition, 10, "the core's answer")

    def finishes(self, connection: object, request_id: str) -> list[FinishReason]:
        items = [item for frame in self.to(connection, Outputs) for item in frame.items]
        return [i.finish_reason for i in items if i.request_id == request_id and i.finish_reason is not None]


@pytest.fixture
def start(fake_model: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(core: dict[str, Any] | None = None, **options: Any) -> Running:
        started.append(Running(fake_model, tmp_path, core or {}, **options))
        started[-1].thread.start()
        return started[-1]

    yield make
    for running in started:
        running.core.post(EVERYONE, Stop())
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_accepted_comes_before_outputs_and_both_go_to_the_asker(start: Callable[..., Running]) -> None:
    running = start()
    running.core.post("a", ask("1", PROMPT, max_tokens=2))
    running.core.post("b", ask("2", PROMPT, n=2, max_tokens=2))
    running.wait(lambda: running.finishes("a", "1") and len(running.finishes("b", "2")) == 2)
    assert running.to("a")[0] == Accepted("1", 3) and running.to("b")[0] == Accepted("2", 3)
    assert {item.request_id for frame in running.to("a", Outputs) for item in frame.items} == {"1"}


def test_one_frame_for_each_connection_and_step(start: Callable[..., Running]) -> None:
    running = start()
    running.core.post("a", ask("1", PROMPT, n=2, max_tokens=5, ignore_eos=True))
    running.wait(lambda: len(running.finishes("a", "1")) == 2)
    assert [len(frame.items) for frame in running.to("a", Outputs)] == [2] * 5


def test_the_queue_is_bounded(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=20.0)
    for number in range(6):
        running.core.post("a", ask(str(number), PROMPT, max_tokens=6, ignore_eos=True))
    running.wait(lambda: len(running.to("a", Rejected)) == 2)
    for rejected in running.to("a", Rejected):
        assert (rejected.code, rejected.retry_after_s) == ("overloaded", 1)
    running.wait(lambda: all(running.finishes("a", str(number)) for number in range(4)))


@pytest.mark.parametrize("n", [0, -1, 5])
def test_n_that_could_never_fit_is_an_invalid_request(start: Callable[..., Running], n: int) -> None:
    running = start()
    running.core.post("a", ask("1", PROMPT, n=n))
    running.wait(lambda: running.to("a", Rejected))
    assert (running.to("a", Rejected)[0].code, running.to("a", Rejected)[0].param) == ("invalid_request", "n")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ask("1", []), "invalid_request"),
        (ask("1", [10**6]), "invalid_request"),
        (ask("1", PROMPT, max_tokens=10**6), "context_length_exceeded"),
        (msgspec.structs.replace(ask("1", PROMPT), adapter="none@000000000000"), "model_not_found"),
    ],
)
def test_refusals(start: Callable[..., Running], request_: Generate, code: str) -> None:
    running = start()
    running.core.post("a", request_)
    running.wait(lambda: running.to("a", Rejected))
    assert running.to("a", Rejected)[0].code == code


def test_an_id_that_runs_already_is_refused_and_the_first_goes_on(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    running.core.post("a", ask("1", PROMPT, max_tokens=5, ignore_eos=True))
    running.core.post("b", ask("1", PROMPT))
    running.wait(lambda: running.to("b", Rejected) and running.finishes("a", "1"))
    assert running.to("b", Outputs) == []


def test_only_the_asker_can_abort(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    running.core.post("a", ask("1", PROMPT, n=2, max_tokens=400, ignore_eos=True))
    running.core.post("b", Abort("1"))
    running.core.post("a", Abort("1", 0))
    running.core.post("a", Abort("1", 7))
    running.core.post("a", Abort("unknown"))
    running.wait(lambda: running.backend.stats.num_running == 1)
    running.core.post("a", Abort("1"))
    running.wait(lambda: not running.backend.has_work)
    assert running.finishes("a", "1") == []


def test_a_connection_that_ends_takes_its_requests_along(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    for number in range(3):
        running.core.post("a", ask(str(number), PROMPT, max_tokens=400, ignore_eos=True))
    running.core.post("b", ask("b", PROMPT, max_tokens=3, ignore_eos=True))
    running.core.post("a", Disconnected())
    running.wait(lambda: running.finishes("b", "b"))
    running.wait(lambda: not running.backend.has_work)
    assert running.backend.stats.num_aborted == 3


def test_drain_refuses_new_requests_and_finishes_old_ones(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    running.core.post("a", ask("old", PROMPT, max_tokens=10, ignore_eos=True))
    running.core.post("s", StartDrain())
    running.core.post("a", ask("new", PROMPT))
    running.wait(lambda: running.finishes("a", "old"))
    assert running.to(EVERYONE, Draining) and running.to("a", Rejected)[0].code == "draining"
    assert running.to("a", Rejected)[0].retry_after_s is not None


def test_stop_ends_what_runs_with_an_error(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    running.core.post("a", ask("1", PROMPT, n=2, max_tokens=400, ignore_eos=True))
    running.wait(lambda: running.to("a", Outputs))
    running.core.post(EVERYONE, Stop())
    running.thread.join(10)
    assert running.finishes("a", "1") == [FinishReason.ERROR] * 2


def test_heartbeats_come_when_idle_and_when_busy(start: Callable[..., Running]) -> None:
    running = start(tokens_per_s=50.0)
    running.wait(lambda: len(running.to(EVERYONE, Heartbeat)) >= 2)
    running.core.post("a", ask("1", PROMPT, max_tokens=200, ignore_eos=True))
    running.wait(lambda: any(beat.stats.num_running == 1 for beat in running.to(EVERYONE, Heartbeat)))


def test_adapters_load_run_and_unload(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(tokens_per_s=50.0)
    entry = publish(running.registry, tmp_path / "work", "xiaozhi")
    running.core.post("a", LoadAdapter("c1", "xiaozhi"))
    running.wait(lambda: running.to("a", AdapterReply))
    assert [adapter.id for adapter in running.to("a", AdapterReply)[0].adapters] == [entry.id]
    assert [adapter.id for adapter in running.to(EVERYONE, Adapters)[-1].adapters] == [entry.id]

    running.core.post("a", msgspec.structs.replace(ask("1", PROMPT, max_tokens=30, ignore_eos=True), adapter=entry.id))
    running.wait(lambda: running.to("a", Outputs))
    running.core.post("a", UnloadAdapter("c2", "xiaozhi"))
    running.core.post("a", msgspec.structs.replace(ask("2", PROMPT), adapter=entry.id))
    running.core.post("a", LoadAdapter("c3", "xiaozhi"))
    running.wait(lambda: running.to("a", Rejected) and len(running.to("a", AdapterReply)) == 2)
    assert running.to("a", Rejected)[0].code == "model_not_found"
    assert running.to("a", AdapterReply)[1].call_id == "c3"
    assert "being unloaded" in running.to("a", AdapterReply)[1].error
    assert not running.finishes("a", "1")

    running.wait(lambda: len(running.to("a", AdapterReply)) == 3)
    assert running.finishes("a", "1") == [FinishReason.LENGTH]
    assert running.to("a", AdapterReply)[2].call_id == "c2" and running.to(EVERYONE, Adapters)[-1].adapters == []
    running.core.post("a", LoadAdapter("c4", "xiaozhi"))
    running.wait(lambda: len(running.to("a", AdapterReply)) == 4)
    assert running.to("a", AdapterReply)[3].error is None


def test_unknown_adapters(start: Callable[..., Running]) -> None:
    running = start()
    running.core.post("a", LoadAdapter("c1", "nobody"))
    running.core.post("a", LoadAdapter("c2", "../etc"))
    running.core.post("a", UnloadAdapter("c3", "nobody"))
    running.wait(lambda: len(running.to("a", AdapterReply)) == 3)
    codes = {reply.call_id: reply.error_code for reply in running.to("a", AdapterReply)}
    assert codes == {"c1": "model_not_found", "c2": "invalid_adapter", "c3": "model_not_found"}


def test_a_newer_revision_takes_the_name_over(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start()
    old = publish(running.registry, tmp_path / "1", "x", seed=1)
    running.core.post("a", LoadAdapter("c1", "x"))
    running.wait(lambda: len(running.to("a", AdapterReply)) == 1)
    new = publish(running.registry, tmp_path / "2", "x", seed=2)
    running.core.post("a", LoadAdapter("c2", "x"))
    running.wait(lambda: len(running.to("a", AdapterReply)) == 2)
    listed = running.to(EVERYONE, Adapters)[-1].adapters
    assert {(adapter.id, adapter.is_current) for adapter in listed} == {(old.id, False), (new.id, True)}
