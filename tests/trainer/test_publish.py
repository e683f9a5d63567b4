"""Publishing behind the gate: what enters the registry, what the name means then, and what the card remembers."""

import json
import shutil
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.store.card import read_card
from server.store.hashes import folder_hash, weights_hash
from server.store.home import Home
from server.store.registry import Registry, RegistryError
from server.text.identity import text_identity
from tests.trainer.compare.evaluations import evaluation
from tests.trainer.compare.test_differences import compared
from trainer.__main__ import main
from trainer.compare.comparison import Comparison
from trainer.compare.report import write_report
from trainer.compare.run import Request, compare
from trainer.errors import GateRefused
from trainer.evaluate.fingerprint import fingerprint
from trainer.evaluate.settings import EvalSettings
from trainer.gate import GateRules
from trainer.publish import Evidence, check_publishable, promote, publish, publish_proved, rollback
from trainer.results.adapter_folder import named_folder

BETTER, WORSE = [0.9] * 12, [0.1] * 12
HASH = "f" * 64


def report_about(model: Path, adapter: Path, scores: list[float], *, revision: str | None = None) -> Comparison:
    """As `compare` would make it of this base and this adapter."""
    weights, text = weights_hash(model), text_identity(model)
    own = revision or folder_hash(adapter)
    task = {"choice/a": ("accuracy", [0.5] * len(scores))}
    base = evaluation("base", task, fingerprint=fingerprint(weights, "", "hf fp32", text))
    tuned = evaluation(
        "tuned",
        {"choice/a": ("accuracy", scores)},
        adapter=f"tuned@{own}",
        fingerprint=fingerprint(weights, own, "hf fp32", text),
    )
    return compared(base, tuned)


def evidence(model: Path, adapter: Path, scores: list[float]) -> Evidence:
    return Evidence(comparison=report_about(model, adapter, scores), report_hash=HASH)


@pytest.fixture
def second(adapter_folder: Path, tmp_path: Path) -> Path:
    """Another content, so another revision."""
    folder = shutil.copytree(adapter_folder, tmp_path / "second")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text("utf-8") + "\n", encoding="utf-8")
    return folder


def test_a_better_adapter_gets_the_name_and_its_card_the_proof(
    model_folder: Path, adapter_folder: Path, home: Home
) -> None:
    proof = evidence(model_folder, adapter_folder, BETTER)
    done = publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    assert done.entry.is_current and not done.is_forced
    card = read_card(done.entry.path)
    assert (card.gate, card.report_hash) == ("passed", HASH)
    assert card.scores == pytest.approx({"choice/a/accuracy": 0.9, "choice/a/accuracy/change": 0.4})


def test_a_worse_one_enters_but_the_name_stays(
    model_folder: Path, adapter_folder: Path, second: Path, home: Home
) -> None:
    first = publish(adapter_folder, "x", home, base=str(model_folder))
    proof = evidence(model_folder, second, WORSE)
    with pytest.raises(GateRefused, match=rf"x still means {first.id}: domain \(choice/a\): refused, accuracy -40.0"):
        publish_proved(second, "x", home, GateRules(), proof, base=str(model_folder))
    registry = Registry(home.adapters)
    assert registry.current("x") == first.revision
    card = registry.get("x", folder_hash(second)).card
    assert card.gate == "refused" and "accuracy -40.0" in card.gate_reason and card.scores


def test_without_evidence_it_is_refused_and_told_what_to_do(
    model_folder: Path, adapter_folder: Path, home: Home
) -> None:
    with pytest.raises(GateRefused, match=r"x still means nothing: .*no evidence.*--report"):
        publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(model_folder))
    assert Registry(home.adapters).revisions("x") == {folder_hash(adapter_folder)}


def test_force_moves_the_name_and_is_remembered(model_folder: Path, adapter_folder: Path, home: Home) -> None:
    proof = evidence(model_folder, adapter_folder, WORSE)
    done = publish_proved(
        adapter_folder, "x", home, GateRules(), proof, base=str(model_folder), force="the customer wants it"
    )
    assert done.is_forced and Registry(home.adapters).current("x") == done.entry.revision
    card = read_card(done.entry.path)
    assert card.gate == "forced" and card.gate_reason.startswith("the customer wants it; domain (choice/a): refused")


def test_a_report_about_something_else_is_refused(
    model_folder: Path, adapter_folder: Path, second: Path, home: Home, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the report compares tuned .*, not this adapter"):
        proof = evidence(model_folder, second, BETTER)
        publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text("utf-8").replace('"rope_theta": ', '"rope_theta": 1'), encoding="utf-8")
    assert weights_hash(other) != weights_hash(model_folder)
    with pytest.raises(ConfigError, match="not the base model of this adapter"):
        proof = evidence(other, adapter_folder, BETTER)
        publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    forged = report_about(model_folder, second, BETTER)  # renamed to the right revision, but measured on another
    text = forged.candidates[1].info.adapter
    from dataclasses import replace

    info = replace(forged.candidates[1].info, adapter=text.replace(folder_hash(second), folder_hash(adapter_folder)))
    forged = replace(forged, candidates=(forged.candidates[0], replace(forged.candidates[1], info=info)))
    with pytest.raises(ConfigError, match="not this adapter"):
        publish_proved(
            adapter_folder,
            "x",
            home,
            GateRules(),
            Evidence(comparison=forged, report_hash=HASH),
            base=str(model_folder),
        )
    assert Registry(home.adapters).revisions("x") == set()  # nothing entered


def test_an_earlier_proof_is_not_forgotten_for_want_of_a_new_one(
    model_folder: Path, adapter_folder: Path, home: Home
) -> None:
    proof = evidence(model_folder, adapter_folder, BETTER)
    publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    with pytest.raises(GateRefused):
        publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(model_folder))
    publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(model_folder), force="once more")
    card = Registry(home.adapters).get("x").card
    assert card.gate == "passed" and card.scores


def test_what_was_refused_and_is_forced_keeps_its_figures(model_folder: Path, adapter_folder: Path, home: Home) -> None:
    proof = evidence(model_folder, adapter_folder, WORSE)
    with pytest.raises(GateRefused):
        publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(model_folder), force="we know why")
    card = Registry(home.adapters).get("x").card
    assert card.gate == "forced" and card.scores and card.report_hash
    assert card.gate_reason.startswith("we know why; domain (choice/a): refused")


def test_a_wrong_base_is_put_right_until_something_speaks_for_it(
    model_folder: Path, adapter_folder: Path, home: Home, tmp_path: Path
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text("utf-8").replace('"rope_theta": ', '"rope_theta": 1'), encoding="utf-8")
    with pytest.raises(GateRefused):
        publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(other))
    proof = evidence(model_folder, adapter_folder, BETTER)
    done = publish_proved(adapter_folder, "x", home, GateRules(), proof, base=str(model_folder))
    card = read_card(done.entry.path)
    assert (card.base_weights_hash, card.gate) == (weights_hash(model_folder), "passed")
    with pytest.raises(RegistryError, match=r"belongs to the base .* publish it under another name"):
        check_publishable(adapter_folder, "x", home, base=str(other))  # before anything is measured
    assert read_card(done.entry.path) == card


def test_a_current_revision_that_a_new_report_refuses_is_forced_with_a_reason(
    model_folder: Path, adapter_folder: Path, home: Home
) -> None:
    better, worse = (evidence(model_folder, adapter_folder, scores) for scores in (BETTER, WORSE))
    publish_proved(adapter_folder, "x", home, GateRules(), better, base=str(model_folder))
    with pytest.raises(GateRefused):
        publish_proved(adapter_folder, "x", home, GateRules(), worse, base=str(model_folder))
    publish_proved(adapter_folder, "x", home, GateRules(), None, base=str(model_folder), force="it stays")
    card = Registry(home.adapters).get("x").card
    assert card.gate == "forced" and card.gate_reason.startswith("it stays; domain")


def test_promote_asks_the_card_and_rollback_goes_back(
    model_folder: Path, adapter_folder: Path, second: Path, home: Home
) -> None:
    first = publish(adapter_folder, "x", home, base=str(model_folder))
    with pytest.raises(GateRefused):
        publish_proved(second, "x", home, GateRules(), evidence(model_folder, second, WORSE), base=str(model_folder))
    revision = folder_hash(second)
    with pytest.raises(GateRefused, match=r"was refused when it was published: domain"):
        promote("x", revision, home)
    assert promote("x", revision, home, force="trial").is_current
    assert Registry(home.adapters).get("x", revision).card.gate_reason.startswith("trial; domain")
    assert rollback("x", home).id == first.id
    with pytest.raises(RegistryError, match="no earlier revision"):
        rollback("x", home)


def test_an_adapter_is_named_as_people_name_it(
    model_folder: Path, adapter_folder: Path, second: Path, home: Home
) -> None:
    first, other = (publish(one, "x", home, base=str(model_folder)) for one in (adapter_folder, second))
    assert named_folder("x", home) == (other.path, None)
    assert named_folder(first.id, home) == (first.path, None)
    (home.models / first.card.base_model).mkdir()
    assert named_folder(first.id, home) == (first.path, first.card.base_model)
    assert named_folder(str(second), home) == (second, None)
    assert named_folder("Qwen/Qwen2-7B", home) is named_folder("y", home) is None
    for name, said in (("x@123", "not a revision"), ("x@aaaaaaaaaaaa", "no revision aaaaaaaaaaaa"), ("y@1", "not a")):
        with pytest.raises(ConfigError, match=said):
            named_folder(name, home)


def test_a_comparison_looks_for_everybody_before_anybody_is_asked(
    model_folder: Path, adapter_folder: Path, home: Home
) -> None:
    publish(adapter_folder, "x", home, base=str(model_folder))
    said: list[str] = []
    for wrong in ("nobody", "x@aaaaaaaaaaaa"):
        request = Request(candidates=[str(model_folder), "x", wrong], others=["safety"])
        with pytest.raises(ConfigError, match=wrong):
            compare(request, home, say=said.append)
    assert said == []


def test_options_of_one_kind_of_task_are_heard_where_another_stands_alone(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [{"question": f"{n}?", "A": "x", "B": "y", "answer": "A"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"candidates": ["nobody", "x"], "settings": EvalSettings(shots=1, shuffle=True)}
    with pytest.raises(ConfigError, match="nobody"):  # all is well with the tasks
        compare(Request(domain=[f"choice={path}"], others=["safety"], **asked), home)
    with pytest.raises(ConfigError, match="--shots: only tasks of the kinds choice"):
        compare(Request(others=["safety"], **asked), home)


def test_the_command_line(
    model_folder: Path, adapter_folder: Path, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["publish", str(adapter_folder), "--name", "x", "--base", str(model_folder), "--home", str(home.path)]
    assert main(words) == 7
    assert "of an adapter from elsewhere the held-out rows are not known" in capsys.readouterr().err
    for name, scores in (("good", BETTER), ("bad", WORSE)):
        write_report(report_about(model_folder, adapter_folder, scores), tmp_path / name, "en")
    assert main([*words, "--report", str(tmp_path / "bad")]) == 7
    assert "domain (choice/a): refused" in capsys.readouterr().err
    assert main([*words, "--report", str(tmp_path / "good"), "--require", "identity"]) == 7
    assert main([*words, "--report", str(tmp_path / "good")]) == 0
    assert f"published x@{folder_hash(adapter_folder)}" in capsys.readouterr().out
    for more, said in (
        (["--report", str(tmp_path / "good"), "--domain", "choice=x"], "--domain: --report holds what was measured"),
        (["--report", str(tmp_path / "good"), "--output", str(tmp_path)], "--output: --report holds"),
        (["--reason", "because"], "--reason: goes with --force"),
        (["--name", "a name"], "'a name' is not a usable name"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--margin", "nan"])
    assert "a number of points from 0 up" in capsys.readouterr().err
    assert main(["publish", "nobody", "--name", "x", "--home", str(home.path)]) == 2
    assert "nobody: is no run, no adapter folder and no published adapter" in capsys.readouterr().err
    assert main([*words, "--report", str(tmp_path / "none")]) == 2
    assert main(["rollback", "x", "--home", str(home.path)]) == 2
