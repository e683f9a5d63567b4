"""After training: files and hashes, then tokens through real engines and a real server."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from server.errors import ConfigError, EngineUnavailable, InvalidRequest, QloopError
from server.store.home import Home
from tests.services import Service
from trainer.__main__ import main
from trainer.child_engine import TRIAL, Trial
from trainer.errors import NotServable
from trainer.publish import publish
from trainer.results.adapter_folder import FoundAdapter, find_adapter
from trainer.results.card import make_card
from trainer.verify.findings import Finding
from trainer.verify.parity import NONE, compare
from trainer.verify.proof import Job, clear_gap, default_prompts, prove
from trainer.verify.rules import check_rules
from trainer.verify.sources import EngineSource, ServerSource
from trainer.verify.target import Server, Target


@pytest.fixture
def found(model_folder: Path, adapter_folder: Path, home: Home) -> FoundAdapter:
    return find_adapter(adapter_folder, home, str(model_folder))


def faults(found: FoundAdapter, target: Target) -> list[Finding]:
    card = make_card(found.config, found.base, found.base_name, found.record)
    return [one for one in check_rules(found, card, target) if one.state == "fault"]


def the_servers(found: FoundAdapter, **facts: object) -> Target:
    """A server that fits, but for `facts`."""
    card = make_card(found.config, found.base, found.base_name, found.record)
    fitting = {
        "engine": "hf",
        "url": "http://x",
        "weights_hash": card.base_weights_hash,
        "tokenizer_hash": card.tokenizer_hash,
        "chat_template_hash": card.chat_template_hash,
        "default_system_prompt_hash": card.default_system_prompt_hash,
        "stop_token_ids": card.stop_token_ids,
    }
    return Target(**{**fitting, **facts})  # type: ignore[arg-type]


def test_an_adapter_that_fits_has_no_fault(found: FoundAdapter) -> None:
    assert faults(found, Target(engine="hf")) == faults(found, Target(engine="vllm", max_rank=16)) == []
    assert faults(found, the_servers(found)) == []


@pytest.mark.parametrize(
    ("check", "facts"),
    [
        ("rank", {"max_rank": 2}),
        ("base weights", {"weights_hash": "0" * 64}),
        ("tokenizer", {"tokenizer_hash": "0" * 64}),
        ("chat template", {"chat_template_hash": "0" * 64}),
        ("default system prompt", {"default_system_prompt_hash": "0" * 64}),
        ("stop tokens", {"stop_token_ids": (1,)}),
    ],
)
def test_what_differs_from_the_server_is_named(found: FoundAdapter, check: str, facts: dict[str, object]) -> None:
    wrong = faults(found, the_servers(found, **facts))
    assert [one.check for one in wrong] == [check] and wrong[0].cure


def test_tensors_that_are_no_lora_are_named(found: FoundAdapter, tmp_path: Path, home: Home) -> None:
    folder = shutil.copytree(found.folder, tmp_path / "more")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    wrong = faults(find_adapter(folder, home, str(found.base)), Target(engine="vllm"))
    assert [one.check for one in wrong] == ["tensors"] and "lm_head.weight" in wrong[0].detail


def test_prompts_and_dtypes() -> None:
    assert len(set(default_prompts(32))) == 32 and len(default_prompts(3)) == 3
    with pytest.raises(ConfigError, match="1 to 32"):
        default_prompts(33)
    assert (clear_gap("fp32"), clear_gap("bf16")) == (1e-3, 0.1)
    with pytest.raises(ConfigError, match="nf4 weights"):
        clear_gap("nf4")


def test_a_fault_of_the_rules_ends_it_before_anything_is_loaded(found: FoundAdapter, home: Home) -> None:
    said: list[str] = []
    proof = prove(
        Job(found=found, home=home, target=Target(engine="hf", max_rank=2), prompts=["x"], num_tokens=4), said.append
    )
    assert said == [] and proof.served == proof.merged == NONE
    with pytest.raises(NotServable, match=r"^rank: rank 4, the engine takes at most 2; start the engine with"):
        proof.check()


def test_more_tokens_than_the_base_has_positions_are_refused_before_anything_is_loaded(
    found: FoundAdapter, home: Home
) -> None:
    said: list[str] = []

    def most(server: Server | None) -> int:
        target, prompts = Target(engine="hf"), default_prompts(4)
        job = Job(found=found, home=home, target=target, server=server, prompts=prompts, num_tokens=99_999)
        with pytest.raises(ConfigError, match=r"--tokens 99999: .* positions, and the longest prompt takes") as refused:
            prove(job, said.append)
        return int(str(refused.value).rpartition(" ")[2])

    assert most(None) == most(Server("http://x")) + 1 and said == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequest("at most 8 tokens"), "the hf engine gave no answer: at most 8 tokens"),
        (EngineUnavailable("it is gone"), "the hf engine gave no answer: it is gone (its last words: out of memory)"),
    ],
)
def test_an_engine_that_gives_no_answer_is_a_fault_beside_the_others(
    found: FoundAdapter, home: Home, monkeypatch: pytest.MonkeyPatch, error: QloopError, told: str
) -> None:
    async def generate(request: object) -> None:
        raise error

    @asynccontextmanager
    async def engine(trial: Trial, *_: object) -> AsyncIterator[Any]:
        (trial.home.path / "engine.log").write_text("starting\nout of memory\n", encoding="utf-8")
        adapters, model = [SimpleNamespace(name=TRIAL, id="trial@0")], SimpleNamespace(backend="hf", dtype="fp32")
        yield SimpleNamespace(adapters=adapters, model=model, generate=generate)

    monkeypatch.setattr("trainer.verify.proof.child_engine", engine)
    job = Job(found=found, home=home, target=Target(engine="hf"), prompts=default_prompts(2), num_tokens=4)
    proof = prove(job, lambda text: None)
    assert [(one.check, str(one)) for one in proof.faults] == [("served", told)]
    assert proof.served == NONE and proof.merged.num_tokens == 8


@pytest.mark.slow
@pytest.mark.e2e
def test_an_engine_that_dies_leaves_the_table_and_the_file(
    found: FoundAdapter, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = EngineSource.go_on

    async def killed(source: EngineSource, ids: Sequence[int], count: int) -> list[str]:
        for child in psutil.Process().children():
            with suppress(psutil.ZombieProcess):  # of the call before
                if "server.engine" in child.cmdline():
                    child.kill()
        return await go_on(source, ids, count)

    monkeypatch.setattr(EngineSource, "go_on", killed)
    output = tmp_path / "verify.json"
    words = ["verify", str(found.folder), "--base", str(found.base), "--home", str(home.path), "--prompts", "2"]
    assert main([*words, "--tokens", "4", "--output", str(output)]) == 8
    told = capsys.readouterr()
    assert re.search(r"served +FAULT +the hf engine gave no answer: .* \(its last words: ", told.out)
    assert told.err.splitlines()[-1].startswith("error: served: the hf engine gave no answer")
    assert json.loads(output.read_text("utf-8"))["merged"]["num_tokens"] == 8


@pytest.mark.e2e
def test_hf_and_peft_merged_weights_and_an_engine_agree(found: FoundAdapter, home: Home) -> None:
    job = Job(found=found, home=home, target=Target(engine="hf"), prompts=default_prompts(3), num_tokens=12)
    proof = prove(job, lambda text: None)
    assert proof.faults == ()
    assert proof.served.num_tokens == proof.merged.num_tokens == 36
    assert proof.merged.share >= 0.99
    assert {"method", "tensors", "rank", "merged", "served"} == {one.check for one in proof.findings}


@pytest.mark.slow
@pytest.mark.e2e
def test_an_adapter_that_the_engine_refuses_is_told_with_its_reason(
    found: FoundAdapter, home: Home, tmp_path: Path
) -> None:
    """And nobody is asked in its place."""
    folder = shutil.copytree(found.folder, tmp_path / "blank")
    tensors = load_file(folder / "adapter_model.safetensors")
    blank = {name: weight * ("lora_B" not in name) for name, weight in tensors.items()}
    save_file(blank, folder / "adapter_model.safetensors")
    other = find_adapter(folder, home, str(found.base))
    job = Job(found=other, home=home, target=Target(engine="hf"), prompts=default_prompts(1), num_tokens=4)
    with pytest.raises(NotServable, match=r"^served: the engine does not serve this adapter: .* changes nothing"):
        prove(job, lambda text: None).check()


@pytest.fixture(scope="module")
def served(model_folder: Path, adapter_folder: Path) -> Iterator[Service]:
    service = Service(model_folder, engine="hf", hf_dtype="fp32")
    try:
        publish(adapter_folder, "friend", Home(service.home), base=str(model_folder))
        yield service.wait_ready()
    finally:
        service.stop()


@pytest.mark.slow
@pytest.mark.e2e
def test_32_prompts_of_64_tokens_through_the_command_and_a_server(
    served: Service, found: FoundAdapter, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(found.folder), "--base", str(found.base), "--home", str(home.path)]
    for more, name in ([], "engine"), (["--server", served.url], "server"):
        output = tmp_path / f"{name}.json"
        assert main([*words, *more, "--output", str(output)]) == 0, capsys.readouterr()
        proof = json.loads(output.read_text("utf-8"))
        assert proof["served"]["num_tokens"] == proof["merged"]["num_tokens"] == 32 * 64
        assert proof["served"]["disagreements"] == []
    told = capsys.readouterr().out
    assert "reading the reference: 2048 of 2048 tokens are the same" in told


@pytest.mark.slow
@pytest.mark.e2e
def test_another_adapter_than_the_server_has_is_found_out(
    served: Service, found: FoundAdapter, home: Home, tmp_path: Path
) -> None:
    """One weight is larger: it has another revision, and where that is not looked at, other tokens."""
    from server.text.render import ChatRenderer
    from trainer.verify.reference import load_adapted, references

    folder = shutil.copytree(found.folder, tmp_path / "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight * 1.5 for name, weight in tensors.items()}, folder / "adapter_model.safetensors")
    other = find_adapter(folder, home, str(found.base))
    server = Server(served.url)
    job = Job(found=other, home=home, target=server.target(), server=server, prompts=default_prompts(2), num_tokens=16)
    with pytest.raises(NotServable, match=r"does not serve revision"):
        prove(job, lambda text: None).check()
    renderer = ChatRenderer.load(found.base)
    expected = references(load_adapted(other), renderer, default_prompts(2), 16)
    source = ServerSource(server, "friend", renderer)
    agreements = [asyncio.run(compare(one, source.go_on, source.label, 1e-3)) for one in expected]
    assert all(len(one.disagreements) == 1 for one in agreements)


def test_a_server_that_is_none(tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "x", "--server", "http://127.0.0.1:9", "--home", str(home.path)]) == 2
    assert "is the server running?" in capsys.readouterr().err
    assert main(["verify", "x", "--server", "file:///etc/passwd", "--home", str(home.path)]) == 2
    assert "an http:// or https:// URL is needed" in capsys.readouterr().err
