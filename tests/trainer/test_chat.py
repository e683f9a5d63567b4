"""Which folder a name means to `chat`, and one talk with a real engine."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.messages import SamplingParams
from server.errors import ConfigError, EngineUnavailable
from server.store.home import Home
from server.store.registry import Registry
from server.text.render import ChatRenderer
from tests.server.store.safetensors_files import write_adapter
from tests.services import ROOT
from trainer.chat import Talk, _answer
from trainer.child_engine import TRIAL, Trial, find_trial
from trainer.publish import publish


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_model_folder_is_talked_to_as_it_is(tiny_model: Path, home: Home, work: Path) -> None:
    trial = find_trial(str(tiny_model), home, work)
    assert (trial.model, trial.adapter) == (tiny_model, None)
    other = work / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match="no such folder"):
        find_trial("nobody", home, other)


def test_an_adapter_is_published_for_the_talk_only(tiny_model: Path, home: Home, work: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "foreign")
    publish(adapter, "known", home, base=str(tiny_model))
    (home.models / "tiny-qwen2").symlink_to(tiny_model)
    trial = find_trial("known", home, work)
    assert (trial.model, trial.adapter) == (tiny_model, TRIAL)
    assert [entry.name for entry in Registry(trial.home.adapters).entries()] == [TRIAL]
    assert [entry.name for entry in Registry(home.adapters).entries()] == ["known"]


def test_a_run_that_trained_all_weights_is_a_model(home: Home, work: Path) -> None:
    run = home.runs / "full"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"id": "full", "state": "done", "output": "model"}))
    assert find_trial("full", home, work).model == run / "model"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_talk(tiny_model: Path, home: Home) -> None:
    command = [sys.executable, "-m", "trainer", "chat", str(tiny_model), "--home", str(home.path), "--max-tokens", "4"]
    lines = "你好\n/new\nWho are you?\n\nnever asked\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT, timeout=110)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert not list(home.adapters.iterdir())


def test_a_question_that_fails_is_no_part_of_the_talk(tiny_model: Path, home: Home) -> None:
    class Refusing:
        model = SimpleNamespace(stop_token_ids=())
        adapters: tuple[()] = ()

        async def generate(self, request: Any) -> None:
            raise EngineUnavailable("gone")

    talk = Talk(ChatRenderer.load(tiny_model), "be brief", SamplingParams())
    with pytest.raises(EngineUnavailable):
        asyncio.run(_answer(Refusing(), Trial(tiny_model, home), talk, "你好"))  # type: ignore[arg-type]
    assert talk.messages == [{"role": "system", "content": "be brief"}]
