"""What an answer of several prompts gives when one of them fails."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.answer import Answer, Treatment
from server.api.choice import ChoiceOptions
from server.engine.client import EngineClient, Generation
from server.engine.messages import SamplingParams, SequenceOutput
from server.errors import QloopError
from server.ops.metrics import AnswerTimer
from server.text.render import ChatRenderer
from tests.server.engine.wire import ask

PROMPT = [5, 6, 7]


async def test_what_one_prompt_brought_is_given_before_the_error_of_another(fake_model: Path, tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "engine.sock", role="worker")
    serving: Any = SimpleNamespace(text=SimpleNamespace(renderer=ChatRenderer.load(fake_model)), client=client)
    target: Any = None
    timer = AnswerTimer("completions", "tiny")
    answer = Answer(serving, target, [PROMPT, PROMPT], SamplingParams(), 1, ChoiceOptions(), Treatment(), "1", timer)
    first, second = answer._generations = [Generation(ask(str(number), PROMPT), client) for number in range(2)]
    second.accepted.cancel()  # nobody waits for it here
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    answer.on_news(count)
    first.push(SequenceOutput("0", 0, [5], 1))
    second.fail(QloopError("gone"))
    before = calls
    assert [delta.index for delta in answer.take_deltas()] == [0]
    await asyncio.sleep(0)
    assert calls == before + 1, "nobody is told of the error"
    with pytest.raises(QloopError, match="gone"):
        answer.take_deltas()
