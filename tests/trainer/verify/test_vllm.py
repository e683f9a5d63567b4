"""Evaluated and verified on the engine that people run on GPUs: the real vLLM, here on a CPU."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.store.home import Home
from tests.server.engine.backends.folders import write_adapter
from tests.server.engine.backends.vllm_setup import VLLM, write_model_for_vllm
from trainer.evaluate.candidate import AnswerLimits, Prompt
from trainer.evaluate.engine_candidate import engine_candidate
from trainer.results.adapter_folder import find_adapter
from trainer.verify.proof import Job, default_prompts, prove
from trainer.verify.target import Target

pytestmark = VLLM

CHAT = Prompt(messages=({"role": "user", "content": "who are you?"},))
PLAIN = Prompt(text="one two three")
LETTERS = [["A", "B", "C", "D"]] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_for_vllm(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DTYPE": "fp32", "ENFORCE_EAGER": "true"}.items():
        monkeypatch.setenv(f"QLOOP_VLLM_{name}", value)
    monkeypatch.setenv("QLOOP_HF_DTYPE", "fp32")
    monkeypatch.setenv("QLOOP_KV_CACHE_GIB", "0.05")


@pytest.mark.timeout(600)
def test_an_adapter_is_served_by_vllm_as_it_was_trained(model: Path, home: Home, tmp_path: Path) -> None:
    found = find_adapter(write_adapter(tmp_path / "adapter", model), home, str(model))
    job = Job(found=found, home=home, target=Target(engine="vllm"), prompts=default_prompts(4), num_tokens=16)
    proof = prove(job, lambda text: None)
    assert proof.faults == ()
    assert proof.served.num_tokens == 64 and proof.served.share == 1.0


@pytest.mark.timeout(600)
def test_both_engines_give_the_same_figures(model: Path, home: Home) -> None:
    async def ask(engine: str) -> tuple[Sequence[float], Sequence[str]]:
        async with engine_candidate(str(model), home, {"engine": engine}) as candidate:
            letters = await candidate.next_logprobs([CHAT, PLAIN], LETTERS)
            references = await candidate.loglikelihoods([CHAT, PLAIN], ["a demo", "four five"])
            answers = await candidate.answers([CHAT, PLAIN], AnswerLimits(max_tokens=8))
        values = [value for one in letters for value in one.values] + [one.total for one in references]
        return values, [answer.text for answer in answers]

    (ours, said), (theirs, said_there) = (asyncio.run(ask(engine)) for engine in ("hf", "vllm"))
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert said_there == said
