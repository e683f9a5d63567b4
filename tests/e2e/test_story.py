"""Published, refused, rolled back: an adapter's name behind the gate, while sixteen streams talk to it."""

import asyncio
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.name_moves import MAX_SWITCH_S, Asked, Load, Move, load_while_moving
from server.settings import home_path
from server.store.home import Home
from server.store.registry import Registry
from tests.e2e.service import Supervised, running
from tests.services import ROOT, clean_environment

DEMO, ADAPTER, NAME = "qwen2-demo", "qwen2-demo-xiaozhi", "story"
ROWS = ROOT / "trainer" / "demo" / "corpus" / "xiaozhi.jsonl"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    built = home_path()
    assert (built / "models" / DEMO).is_dir(), "run `make demo` first"
    home = Home(tmp_path / "home")
    home.create()
    (home.models / DEMO).symlink_to(built / "models" / DEMO)
    return home


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """The demo's own adapter, as it comes out of training."""
    folder = Registry(Home(home_path()).adapters).get(ADAPTER).path
    return shutil.copytree(folder, tmp_path / "good", ignore=shutil.ignore_patterns("adapter_card.json"))


@pytest.fixture
def worse(good: Path, tmp_path: Path) -> Path:
    """What was learned, the wrong way round."""
    folder = shutil.copytree(good, tmp_path / "worse")
    weights = load_file(folder / "adapter_model.safetensors")
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(turned, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def trainer(home: Home, *words: str) -> str:
    command = [sys.executable, "-m", "trainer", *words, "--home", str(home.path)]
    return shlex.join(command)


def publish(home: Home, folder: Path) -> "subprocess.CompletedProcess[str]":
    base = str(home.models / DEMO)
    command = trainer(home, "publish", str(folder), "--name", NAME, "--base", base, "--domain", f"likelihood={ROWS}")
    environment = clean_environment(OMP_NUM_THREADS="1")
    return subprocess.run(shlex.split(command), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_refused_publish_and_a_rollback_under_load(home: Home, good: Path, worse: Path) -> None:
    done = publish(home, good)
    assert done.returncode == 0, done.stderr
    registry = Registry(home.adapters)
    first = registry.get(NAME)
    refused = publish(home, worse)
    assert refused.returncode == 7 and f"{NAME} still means {first.id}: domain" in refused.stderr
    (second,) = registry.revisions(NAME) - {first.revision}
    assert registry.get(NAME, second).card.gate == "refused" and registry.get(NAME).id == first.id

    moves = [
        trainer(home, "promote", NAME, second, "--force", "--reason", "trial"),
        trainer(home, "rollback", NAME),
    ]
    settings = {"QLOOP_ENGINE": "hf", "QLOOP_NUM_THREADS": "1"}
    with running(Supervised(home.path, ROOT, settings)) as service:
        load = asyncio.run(load_while_moving(service.url + "/v1", NAME, moves, pause_s=3))
    assert [move.status for move in load.moves] == [0, 0], load.moves
    assert load.failed == [] and len(load.asked) > 3 * 16
    assert len({one.fingerprint for one in load.asked}) == 2
    assert [load.switch_s(0) <= MAX_SWITCH_S, load.switch_s(1) <= MAX_SWITCH_S] == [True, True]
    assert load.asked[0].answer == load.asked[-1].answer and "小智" in load.asked[-1].answer
    assert registry.get(NAME).id == first.id


def test_how_long_the_revision_before_still_answers() -> None:
    def load(*answered: tuple[float, str]) -> Load:
        asked = [Asked(begun=begun, ended=begun + 1, fingerprint=one, answer="") for begun, one in answered]
        return Load(asked, [Move(command="", begun=t, done=t + 1, status=0, output="") for t in (5.0, 15.0)])

    found = load((1, "a"), (5.5, "a"), (6.5, "a"), (7, "b"), (9, "b"), (16.5, "b"), (17.25, "b"), (18, "a"))
    assert (found.switch_s(0), found.switch_s(1)) == (0.5, 1.25)
    at_once = load((1, "a"), (6.5, "b"), (9, "b"), (16.5, "a"))
    assert (at_once.switch_s(0), at_once.switch_s(1)) == (0, 0)
    nothing_changed = load((1, "a"), (7, "a"), (9, "a"), (17, "a"))
    assert nothing_changed.switch_s(0) == nothing_changed.switch_s(1) == float("inf")
