"""Requests and calls that wait for a slot, in a running core: in order, not for ever, and never lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.engine.core import Disconnected, RegistryChanged
from server.engine.messages import (
    Abort,
    Accepted,
    AdapterReply,
    Adapters,
    AdapterStates,
    FinishReason,
    Generate,
    ListAdapters,
    LoadAdapter,
    Rejected,
    StartDrain,
    UnloadAdapter,
)
from tests.server.engine.adapters import publish
from tests.server.engine.test_core import PROMPT, Running, start
from tests.server.engine.wire import ask

__all__ = ["start"]  # the fixture

Start = Callable[..., Running]


def wants(request_id: str, adapter: str, max_tokens: int = 400, **fields: Any) -> Generate:
    request = ask(request_id, PROMPT, max_tokens=max_tokens, ignore_eos=True)
    return msgspec.structs.replace(request, adapter=adapter, **fields)


@pytest.fixture
def two(start: Start, tmp_path: Path) -> tuple[Running, str, str]:
    """A core with one slot, two adapters, and a long request on the first."""
    running = start({"max_adapters": 1, "adapter_wait_s": 60}, tokens_per_s=50.0)
    first, second = (publish(running.registry, tmp_path / n, n, seed=i).id for i, n in enumerate(("one", "two")))
    running.core.post("a", LoadAdapter("l2", "two"))
    running.core.post("a", LoadAdapter("l1", "one"))
    running.core.post("a", wants("long", first))
    running.wait(lambda: running.to("a", Accepted))
    return running, first, second


def accepted(running: Running, connection: object = "a") -> list[str]:
    return [message.request_id for message in running.to(connection, Accepted)]


def test_they_are_served_in_order_when_the_slot_is_free(two: tuple[Running, str, str]) -> None:
    running, first, second = two
    running.core.post("a", wants("second", second, 3))
    running.core.post("a", wants("first again", first, 3))  # it may not overtake, or the second would starve
    running.core.post("a", ask("base", PROMPT, max_tokens=3, ignore_eos=True))
    running.wait(lambda: running.finishes("a", "base"))
    assert accepted(running) == ["long", "base"]
    running.core.post("a", Abort("long"))
    running.wait(lambda: running.finishes("a", "first again"))
    assert accepted(running) == ["long", "base", "second", "first again"]
    assert running.finishes("a", "second") == [FinishReason.LENGTH]


def test_they_count_in_the_queue_and_in_the_statistics(two: tuple[Running, str, str]) -> None:
    running, _, second = two
    for number in range(5):  # 2 running, 2 waiting: room for 3 beside the long one
        running.core.post("b", wants(str(number), second))
    running.wait(lambda: len(running.to("b", Rejected)) == 2)
    assert {message.code for message in running.to("b", Rejected)} == {"overloaded"}
    running.wait(lambda: any(getattr(m, "stats", None) and m.stats.num_waiting == 3 for m in running.to("everyone")))
    running.core.post("b", Disconnected())
    running.core.post("a", wants("second", second, 3))
    running.core.post("a", Abort("long"))
    running.wait(lambda: running.finishes("a", "second"))
    assert accepted(running, "b") == []


def test_a_deadline_ends_the_wait(two: tuple[Running, str, str]) -> None:
    running, _, second = two
    running.core.post("a", wants("late", second, deadline_s=0.05))
    running.core.post("a", wants("gone", second))
    running.core.post("a", Abort("gone"))
    running.wait(lambda: running.to("a", Rejected))
    assert [(m.request_id, m.code) for m in running.to("a", Rejected)] == [("late", "deadline_exceeded")]


def test_nobody_waits_for_ever(start: Start, tmp_path: Path) -> None:
    running = start({"max_adapters": 1, "adapter_wait_s": 0.1}, tokens_per_s=50.0)
    first, second = (publish(running.registry, tmp_path / n, n, seed=i).id for i, n in enumerate(("one", "two")))
    running.core.post("a", LoadAdapter("l2", "two"))
    running.core.post("a", LoadAdapter("l1", "one"))
    running.core.post("a", wants("long", first))
    running.core.post("a", wants("second", second))
    running.core.post("a", LoadAdapter("l3", "two"))
    running.wait(lambda: running.to("a", Rejected) and len(running.to("a", AdapterReply)) == 3)
    assert (running.to("a", Rejected)[0].code, running.to("a", Rejected)[0].retry_after_s) == ("overloaded", 1)
    assert (running.to("a", AdapterReply)[2].call_id, running.to("a", AdapterReply)[2].error_code) == (
        "l3",
        "overloaded",
    )


def test_a_load_waits_for_a_slot_too(two: tuple[Running, str, str]) -> None:
    running, _, second = two
    running.core.post("a", LoadAdapter("again", "two"))
    running.core.post("a", wants("second", second, 3))
    running.core.post("a", Abort("long"))
    running.wait(lambda: running.finishes("a", "second"))
    assert running.to("a", AdapterReply)[-1].call_id == "again" and running.to("a", AdapterReply)[-1].error is None


def test_a_drain_refuses_who_waits(two: tuple[Running, str, str]) -> None:
    running, _, second = two
    running.core.post("a", wants("second", second))
    running.core.post("s", StartDrain())
    running.wait(lambda: running.to("a", Rejected))
    assert running.to("a", Rejected)[0].code == "draining" and running.finishes("a", "long") == []


def test_an_unload_refuses_who_waits_for_it(two: tuple[Running, str, str]) -> None:
    running, _, second = two
    running.core.post("a", wants("second", second))
    running.core.post("b", UnloadAdapter("u", "two"))
    running.wait(lambda: running.to("b", AdapterReply))
    running.core.post("a", Abort("long"))
    running.wait(lambda: running.to("a", Rejected))
    assert running.to("a", Rejected)[0].code == "model_not_found"


def test_states_tell_what_only_the_engine_knows(two: tuple[Running, str, str], tmp_path: Path) -> None:
    running, first, second = two
    bad = publish(running.registry, tmp_path / "bad", "bad", base_hash="0" * 64).id
    running.core.post("b", RegistryChanged(["one", "two", "bad"]))
    running.core.post("b", UnloadAdapter("u", "one"))
    running.core.post("b", ListAdapters("l"))
    running.wait(lambda: running.to("b", AdapterStates))
    states = running.to("b", AdapterStates)[0]
    assert (states.max_loaded, states.loaded, states.unloading, list(states.refused)) == (1, [], [first], [bad])
    assert "trained on" in states.refused[bad]
    running.core.post("a", Abort("long"))
    running.wait(lambda: running.to("b", AdapterReply))
    assert [adapter.id for adapter in running.to("everyone", Adapters)[-1].adapters] == [second]


def test_cancelling_ends_running_requests_with_an_error(two: tuple[Running, str, str]) -> None:
    running, _, _ = two
    running.core.post("b", UnloadAdapter("u", "one", cancel=True))
    running.wait(lambda: running.to("b", AdapterReply))
    assert running.finishes("a", "long") == [FinishReason.ERROR] and running.backend.stats.num_running == 0


def test_a_second_unload_joins_the_first_and_may_cancel(two: tuple[Running, str, str]) -> None:
    running, first, _ = two
    running.core.post("b", UnloadAdapter("patient", "one"))
    running.wait(lambda: first not in [a.id for a in running.to("everyone", Adapters)[-1].adapters])
    running.core.post("c", UnloadAdapter("no such", "one", "0" * 12))
    running.core.post("c", UnloadAdapter("patient, too", "one"))
    running.core.post("d", UnloadAdapter("urgent", "one", first.partition("@")[2], cancel=True))
    running.wait(lambda: running.to("d", AdapterReply))
    assert running.finishes("a", "long") == [FinishReason.ERROR]
    replies = {m.call_id: m for connection in "bcd" for m in running.to(connection, AdapterReply)}
    assert replies.pop("no such").error_code == "model_not_found"
    assert {call_id: [a.id for a in reply.adapters] for call_id, reply in replies.items()} == {
        "patient": [first],
        "patient, too": [first],
        "urgent": [first],
    }
    running.core.post("c", UnloadAdapter("late", "one"))
    running.wait(lambda: len(running.to("c", AdapterReply)) == 3)
    assert running.to("c", AdapterReply)[-1].error_code == "model_not_found"


def test_removed_and_published_again_while_it_was_in_use(two: tuple[Running, str, str], tmp_path: Path) -> None:
    """The last request of the old life ends first; then the name is served again, by itself."""
    running, first, _ = two
    running.registry.remove("one")
    running.core.post("b", RegistryChanged(["two"]))
    running.wait(lambda: [a.name for a in running.to("everyone", Adapters)[-1].adapters] == ["two"])
    assert publish(running.registry, tmp_path / "again", "one", seed=0).id == first
    running.core.post("b", RegistryChanged(["one", "two"]))
    running.core.post("a", Abort("long"))
    running.wait(lambda: first in [a.id for a in running.to("everyone", Adapters)[-1].adapters])
