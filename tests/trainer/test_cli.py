import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.store.home import Home
from server.store.registry import Registry
from tests.server.store.safetensors_files import write_adapter
from trainer.__main__ import main

HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy"}


def modules_after(code: str) -> set[str]:
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy() -> None:
    code = "import contextlib\nfrom trainer.__main__ import main\n"
    code += "with contextlib.suppress(SystemExit): main(['train', '--help'])"
    assert modules_after(code).isdisjoint(HEAVY)


def test_the_store_and_all_that_the_cli_needs_before_training_is_light() -> None:
    code = (
        "import server.store.registry, server.store.model_folder, trainer.publish, trainer.labels, trainer.demo.build"
    )
    assert modules_after(code).isdisjoint(HEAVY | {"huggingface_hub"})


def test_an_unknown_option_ends_with_a_suggestion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--home", str(tmp_path), "model=m", "data=x", "num_epoch=3"]) == 2
    assert capsys.readouterr().err == "error: unknown option 'num_epoch': did you mean num_epochs?\n"


def test_a_missing_model_or_file_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--home", str(tmp_path), "model=/no/such", "data=x"]) == 2
    assert main(["train", "--home", str(tmp_path), "--config", str(tmp_path / "no.yaml")]) == 2
    assert main(["publish", "--home", str(tmp_path), "no-such-run", "--name", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_a_missing_data_file_fails_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    words = [f"model={tiny_model}", f"data={tmp_path / 'no.jsonl'}", "run_id=r"]
    assert main(["train", "--home", str(tmp_path), *words]) == 2
    assert "no.jsonl: cannot be read" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "r" / "run.json").read_text())["state"] == "failed"


def test_train_then_publish_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_model}\ndata: {data}\nnum_epochs: 1\nlora_rank: 2\n")
    home = ["--home", str(tmp_path / "home")]
    assert main(["train", *home, "--config", str(file), "run_id=mine"]) == 0
    assert main(["publish", *home, "mine", "--name", "my-adapter"]) == 0
    (entry,) = Registry(tmp_path / "home" / "adapters").entries()
    assert (entry.name, entry.card.run_id) == ("my-adapter", "mine")
    assert f"published {entry.id}" in capsys.readouterr().out


def test_a_foreign_adapter_folder_is_published_with_its_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    adapter = write_adapter(tmp_path / "foreign")
    arguments = ["publish", "--home", str(tmp_path / "home"), str(adapter), "--name", "foreign"]
    assert main(arguments) == 2
    assert "give it with --base" in capsys.readouterr().err
    assert main([*arguments, "--base", str(tiny_model)]) == 0
    entry = Registry(Home(tmp_path / "home").adapters).get("foreign")
    assert (entry.card.base_model, entry.card.rank) == ("tiny-qwen2", 8)
