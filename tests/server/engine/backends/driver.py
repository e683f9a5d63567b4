"""Drive a backend by hand, as the engine's core does, and keep what came out."""

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.engine.backends.base import Backend
from server.engine.messages import AdapterInfo, FinishReason, Generate, SamplingParams, SequenceOutput, TokenLogprobs

INT_IDS = itertools.count(1)  # as the engine's, never given twice


@dataclass
class Text:
    """Everything one sequence returned."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[SequenceOutput] = field(default_factory=list)

    @property
    def last(self) -> SequenceOutput:
        return self.outputs[-1]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason


Texts = dict[tuple[str, int], Text]


def ask(prompt: Iterable[int], request_id: str = "a", **kwargs: object) -> Generate:
    """A greedy request; the request's own fields go to it, the rest to the parameters."""
    own = ("n", "adapter", "priority", "deadline_s", "cache_salt")
    outer = {key: kwargs.pop(key) for key in own if key in kwargs}
    params = SamplingParams(**{"temperature": 0.0, **kwargs})  # type: ignore[arg-type]
    return Generate(request_id=request_id, prompt_token_ids=list(prompt), params=params, **outer)  # type: ignore[arg-type]


def submit(backend: Backend, *requests: Generate) -> None:
    for request in requests:
        backend.check(request)
        backend.add(request)


def collect(outputs: Iterable[SequenceOutput], texts: Texts) -> None:
    for output in outputs:
        text = texts.setdefault((output.request_id, output.index), Text())
        assert not text.outputs or text.finish_reason is None, "an output after the last one"
        is_whole = output.finish_reason is not None and not text.outputs  # beams come at the end, all tokens at once
        assert len(output.new_token_ids) <= 1 or is_whole, "more than one token in a step"
        text.outputs.append(output)
        text.token_ids += output.new_token_ids
        text.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert text.prompt_logprobs is None, "prompt logprobs sent twice"
            text.prompt_logprobs = output.prompt_logprobs
        assert output.num_tokens == len(text.token_ids)


def finish(backend: Backend, texts: Texts | None = None, limit_s: float = 60.0) -> Texts:
    """Step until nothing is left."""
    texts = {} if texts is None else texts
    give_up = time.monotonic() + limit_s
    while backend.has_work:
        assert time.monotonic() < give_up, "the backend never finishes"
        collect(backend.step(), texts)
    return texts


def run(backend: Backend, *requests: Generate) -> Texts:
    submit(backend, *requests)
    return finish(backend)


def step_until_running(backend: Backend, count: int, texts: Texts) -> None:
    """A step may bring nothing yet where another process computes."""
    give_up = time.monotonic() + 10
    while backend.stats.num_running < count:
        assert time.monotonic() < give_up, f"never {count} sequences running"
        collect(backend.step(), texts)


def adapter_info(name: str) -> AdapterInfo:
    return AdapterInfo(name=name, revision="0" * 12, is_current=True, rank=4, created=0, int_id=next(INT_IDS))
