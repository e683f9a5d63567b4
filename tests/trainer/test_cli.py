import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from server.store.home import Home
from server.store.registry import Registry
from tests.server.store.safetensors_files import write_adapter
from tests.services import ROOT
from trainer.__main__ import main

HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy"}


def modules_after(code: str) -> set[str]:
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


LEVELS = [
    [],
    *(["train"], ["dpo"], ["inspect"], ["estimate"], ["data"], ["runs"], ["doctor"], ["merge"], ["publish"]),
    *(["chat"], ["plot"]),
]


@pytest.mark.parametrize("words", LEVELS, ids=lambda words: "-".join(words) or "top")
def test_help_takes_under_a_second_and_imports_nothing_heavy(words: list[str]) -> None:
    code = "import sys, time\n"
    code += "from trainer.__main__ import main\n"
    code += f"try: main([*{words!r}, '--help'])\nexcept SystemExit as end: assert end.code == 0\n"
    code += "assert time.process_time() < 1.0  # not wall time: other tests run beside this one"
    assert modules_after(code).isdisjoint(HEAVY)


def test_the_store_and_all_that_the_cli_needs_before_training_is_light() -> None:
    code = (
        "import server.store.registry, server.store.model_folder, trainer.publish\n"
        "import trainer.examples.labels, trainer.demo.build"
    )
    assert modules_after(code).isdisjoint(HEAVY | {"huggingface_hub"})


def test_an_unknown_option_ends_with_a_suggestion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--home", str(tmp_path), "model=m", "data=.", "num_epoch=3"]) == 2
    assert capsys.readouterr().err == "error: unknown option 'num_epoch': did you mean num_train_epochs?\n"


def test_a_missing_model_or_file_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--home", str(tmp_path), "model=/no/such", "data=."]) == 2
    assert main(["train", "--home", str(tmp_path), str(tmp_path / "no.yaml")]) == 2
    assert main(["publish", "--home", str(tmp_path), "no-such-run", "--name", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_a_missing_data_file_starts_no_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    words = [f"model={tiny_model}", f"data={tmp_path / 'no.jsonl'}", "run_id=r"]
    assert main(["train", "--home", str(tmp_path), *words]) == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    words = [f"model={tiny_model}", f"data={tmp_path / 'a.jsonl'}", f"output_dir={tmp_path / 'file' / 'run'}"]
    assert main(["train", "--home", str(tmp_path), *words]) == 1
    assert main(["data", "clean", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "file" / "o.jsonl")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.endswith(end) for line in lines for end in ("Not a directory", "File exists")].count(True) == 2


def test_a_reader_that_has_enough_gets_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    command = f"{shlex.quote(sys.executable)} -m trainer data check {shlex.quote(str(tmp_path / 'a.jsonl'))} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr == ""


def test_every_fault_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "learing_rate=1", "seed=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


def test_options_of_the_command_may_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--lora_rank", "4", "model=m", "--print-config", "--train_file", ".", "--home", str(tmp_path), "--cpu-ok"]
    assert main(["sft", *words]) == 0
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert printed["lora_rank"] == ["4", "command", "line"]
    assert printed["stage"] == ["sft", "the", "command", "sft"] and printed["cpu_ok"][0] == "true"


def test_train_then_publish_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_model}\ndata: {data}\nnum_epochs: 1\nlora_rank: 2\nmax_length: 256\n")
    home = ["--home", str(tmp_path / "home")]
    assert main(["train", *home, str(file), "run_id=mine"]) == 0
    assert main(["publish", *home, "mine", "--name", "my-adapter"]) == 7  # it held no rows out: nothing proves it
    assert "the run held no rows out" in capsys.readouterr().err
    assert main(["publish", *home, "mine", "--name", "my-adapter", "--force"]) == 0
    (entry,) = Registry(tmp_path / "home" / "adapters").entries()
    assert (entry.name, entry.card.run_id, entry.card.gate) == ("my-adapter", "mine", "forced")
    assert f"published {entry.id}" in capsys.readouterr().out

    assert main(["runs", *home]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.split()[:4] == ["mine", "done", "sft", "lora"]
    assert main(["runs", *home, "show", "mine"]) == 0
    assert "finetuning_type: lora" in capsys.readouterr().out
    assert main(["plot", *home, "mine"]) == 0
    assert main(["runs", *home, "show", "other"]) == 2


def test_inspect_shows_each_token_with_its_label(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, blank_model: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "你是谁？", "output": "a"}) + "\n{bad\n")
    words = ["inspect", "-n", "2", f"model={blank_model}", f"data={data}", "max_length=256"]
    assert main([*words, "--home", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{data}:1: ") and lines[0].endswith(" 2 learned")
    table = [line.split() for line in lines[2:] if line.startswith("  ")]
    assert [row[2] for row in table if row[1] != "-100"] == ["'a'", "'<|im_end|>'"]
    assert all(row[0] == row[1] for row in table if row[1] != "-100")
    assert any(line.startswith(f"{data}:2: dropped") for line in lines)


def test_doctor_names_versions_and_what_can_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--home", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "transformers", "CPU", "GPU", "disk", "LoRA", "QLoRA", "full"):
        assert part in text


def test_a_foreign_adapter_folder_is_published_with_its_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    adapter = write_adapter(tmp_path / "foreign")
    arguments = ["publish", "--home", str(tmp_path / "home"), str(adapter), "--name", "foreign"]
    assert main(arguments) == 2
    assert "give it with --base" in capsys.readouterr().err
    assert main([*arguments, "--base", str(tiny_model), "--force", "--reason", "known"]) == 0
    entry = Registry(Home(tmp_path / "home").adapters).get("foreign")
    assert (entry.card.base_model, entry.card.rank) == ("tiny-qwen2", 8)
