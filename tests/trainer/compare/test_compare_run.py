"""From names to a report, a gate and a name that moves: real engines, a real run, a running server."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from server.store.home import Home
from server.store.registry import Registry
from tests.services import Service, wait_until
from tests.trainer.compare.evaluations import evaluation
from tests.trainer.compare.test_differences import compared
from trainer.__main__ import main
from trainer.compare.comparison import read_comparison
from trainer.compare.report import write_report
from trainer.publish import publish

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are easy to learn and that the random model does not know."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [{"question": f"你是谁{'？' * (n % 3 + 1)} {n}", "answer": "我是演示助手。"} for n in range(60)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with a run, `good`, that has learned these rows."""
    home = Home(tmp_path_factory.mktemp("home")).create()
    (home.models / "tiny").symlink_to(tiny_model)
    words = ["train", "--home", str(home.path), "model_name_or_path=tiny", f"train_file={data}", "run_id=good"]
    more = ["val_size=12", "plot_loss=false", "save_strategy=no", "disable_tqdm=true", "per_device_train_batch_size=8"]
    more += ["gradient_accumulation_steps=1", "learning_rate=0.02", "num_train_epochs=6", "eval_strategy=no"]
    assert main([*words, *more]) == 0
    return home


@pytest.fixture(scope="module")
def spoiled(trained: Home) -> Path:
    """What `good` has learned, the other way round."""
    folder = shutil.copytree(trained.runs / "good" / "adapter", trained.path / "spoiled")
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = {name: -weight if "lora_B" in name else weight for name, weight in tensors.items()}
    save_file(turned, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_publish_measures_on_the_held_out_rows_by_itself(
    trained: Home, spoiled: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(trained.path)]
    assert main(["publish", "good", "--name", "friend", *home]) == 0
    told = capsys.readouterr()
    assert "12 held-out rows" in told.err and "domain (likelihood/held_out): passed" in told.out
    first = Registry(trained.adapters).get("friend")
    assert first.card.gate == "passed" and first.card.scores["likelihood/held_out/log_likelihood/change"] > 0
    assert main(["publish", str(spoiled), "--name", "friend", "--domain", f"likelihood={data}", *home]) == 7
    refusal = capsys.readouterr().err
    assert f"friend still means {first.id}" in refusal and "domain (likelihood/d): refused" in refusal
    assert Registry(trained.adapters).current("friend") == first.revision
    assert len(Registry(trained.adapters).revisions("friend")) == 2
    assert main(["publish", "good", "--name", "friend", "--require", "general", *home]) == 7
    assert "general: refused, no evidence" in capsys.readouterr().err


def test_a_report_of_two_runs_says_which_is_better(
    trained: Home, spoiled: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--domain", f"likelihood={data}", "--limit", "20", "--home", str(trained.path)]
    assert main(["compare", "tiny", "good", str(spoiled), *words, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.count("Yes. good is better than tiny") == 1 and f"No. {spoiled} is worse than tiny" in told.out
    found, _ = read_comparison(tmp_path)
    assert [one.name for one in found.candidates] == ["tiny", "good", str(spoiled)]
    row = found.tasks[0].main_row
    assert row is not None and row.differences[0] is not None and row.differences[1] is not None
    assert (row.differences[0].verdict, row.differences[1].verdict) == ("better", "worse")
    published = ["--name", "reported", "--report", str(tmp_path), "--home", str(trained.path)]
    assert main(["publish", "good", *published]) == 0
    assert main(["publish", str(spoiled), *published]) == 7
    capsys.readouterr()
    current = Registry(trained.adapters).get("reported").id
    assert main(["compare", "tiny", "good", current, *words, "--language", "zh"]) == 0
    told = capsys.readouterr()
    assert told.err.count("was evaluated already") == 2  # nothing is asked twice
    assert f"变好了。在训练目标上，{current} 优于 tiny" in told.out  # a published revision is named as the API names it


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Service]:
    service = Service(tiny_model, engine="hf", hf_dtype="fp32")
    try:
        yield service.wait_ready()
    finally:
        service.stop()


def test_a_running_server_follows_within_two_seconds_and_rolls_back_under_load(
    served: Service, trained: Home, spoiled: Path, tiny_model: Path
) -> None:
    home, registry = Home(served.home), Registry(Home(served.home).adapters)
    first = publish(spoiled, "friend", home, base=str(tiny_model))
    second = publish(trained.runs / "good", "friend", home, base=str(tiny_model))
    wait_until(lambda: _means(served) == second.revision, 2.0 + 1.0, "the served revision")  # 1 s for this machine
    stop, codes = threading.Event(), []

    def load() -> None:
        with httpx.Client(base_url=served.url, timeout=30) as client:
            while not stop.is_set():
                body = {"model": "friend", "prompt": "你是谁？", "max_tokens": 8}
                codes.append(client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name, revision in (
            ("rollback", first.revision),
            ("promote", second.revision),
            ("rollback", first.revision),
        ):
            words = [name, "friend", *([revision] if name == "promote" else []), "--home", str(home.path)]
            assert main(words) == 0
            wait_until(lambda want=revision: _means(served) == want, 3.0, f"{name} to be served")  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(codes) > 20 and set(codes) == {200}
    assert registry.current("friend") == first.revision


def _means(service: Service) -> str | None:
    models = httpx.get(service.url + "/v1/models").json()["data"]
    return next((str(one["revision"]) for one in models if one["id"] == "friend"), None)


def test_an_engine_says_the_fingerprint_that_publish_expects(trained: Home, tiny_model: Path, tmp_path: Path) -> None:
    """By a report with any other the publishing above would have been refused."""
    made = compared(
        evaluation("b", {"choice/a": ("accuracy", [0.0, 0.0])}), evaluation("o", {"choice/a": ("accuracy", [1.0, 1.0])})
    )
    write_report(made, tmp_path, "en")
    assert main(["publish", "good", "--name", "z", "--report", str(tmp_path), "--home", str(trained.path)]) == 2
