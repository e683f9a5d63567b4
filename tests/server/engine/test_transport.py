"""Frames: cut anywhere, joined anyhow, refused when they are none."""

import asyncio
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import transport
from server.engine.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Accepted,
    FinishReason,
    FromEngine,
    Generate,
    Hello,
    Outputs,
    SamplingParams,
    SequenceOutput,
    ToEngine,
    TokenLogprobs,
)
from server.engine.transport import FrameError, FrameProtocol, encode_frame

MESSAGES: list[msgspec.Struct] = [
    Hello(1, "worker", 7),
    Generate(request_id="a", prompt_token_ids=list(range(500)), params=SamplingParams(logit_bias={3: -1.5}, seed=-1)),
    Abort("a", 2),
    Generate(request_id="名", prompt_token_ids=[], params=SamplingParams(), adapter="x@0", deadline_s=0.5, n=3),
]


class Received(FrameProtocol):
    def __init__(self, kind: Any = ToEngine) -> None:
        super().__init__(kind)
        self.messages: list[Any] = []
        self.failures: list[str] = []
        self.num_closed = 0

    def message_received(self, message: Any) -> None:
        self.messages.append(message)

    def closed(self, reason: str | None) -> None:
        self.num_closed += 1

    def protocol_failed(self, reason: str) -> None:
        self.failures.append(reason)


@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.lists(st.integers(1, 300), max_size=60))
def test_any_cut_gives_the_same_messages(messages: list[msgspec.Struct], sizes: list[int]) -> None:
    data, received = b"".join(map(encode_frame, messages)), Received()
    for size in [*sizes, len(data)]:
        received.data_received(data[:size])
        data = data[size:]
    assert received.messages == messages and not received.failures


def test_outputs_survive_the_wire() -> None:
    logprobs = TokenLogprobs(5, -0.1, 1, [5, 6], [-0.1, -2.0], [-3.0])
    item = SequenceOutput("a", 1, [5], 9, FinishReason.STOP, 5, [logprobs], [None, logprobs], None)
    received = Received(FromEngine)
    received.data_received(encode_frame(Outputs([item, item])) + encode_frame(Accepted("a", 3)))
    assert received.messages == [Outputs([item, item]), Accepted("a", 3)]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x80", b"\xa3abc", msgspec.msgpack.encode({"type": "hello"}), msgspec.msgpack.encode(["hello"])],
)
def test_a_frame_that_is_no_message_fails(payload: bytes) -> None:
    received = Received()
    received.data_received(encode_frame(MESSAGES[0]) + struct.pack(">I", len(payload)) + payload)
    assert received.messages == [MESSAGES[0]] and len(received.failures) == 1


def test_an_oversized_frame_is_refused_by_its_length_alone() -> None:
    received = Received()
    received.data_received(struct.pack(">I", MAX_FRAME_BYTES + 1))
    assert received.failures == [f"a frame announces {MAX_FRAME_BYTES + 1} bytes"]


def test_the_sender_refuses_an_oversized_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="Generate of"):
        encode_frame(MESSAGES[1])
    assert encode_frame(MESSAGES[0])


async def test_sending_after_the_end_is_silent_and_closed_is_called_once() -> None:
    ends: list[Received] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ends.append(Received()) or ends[-1], "127.0.0.1", 0)  # type: ignore[func-returns-value]
    _, client = await loop.create_connection(Received, *server.sockets[0].getsockname())
    client.send(MESSAGES[0])
    async with asyncio.timeout(10):
        while not ends or not ends[0].messages:
            await asyncio.sleep(0.01)
        client.abort()
        while not ends[0].num_closed or not client.num_closed:
            await asyncio.sleep(0.01)
    client.send(MESSAGES[0])
    client.abort()
    server.close()
    await server.wait_closed()
    assert (client.num_closed, ends[0].num_closed) == (1, 1)
