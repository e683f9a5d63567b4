"""The command and the check before training, on a tiny model that is really there."""

import json
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.store.home import Home
from tests.trainer.estimate.shapes import QWEN2_7B, QWEN2_HALF_B
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.__main__ import main
from trainer.errors import DoesNotFit
from trainer.estimate.gate import check_fits
from trainer.estimate.reserve import CUDA_CONTEXT, GIB
from trainer.estimate.room import Room, named_gpus
from trainer.estimate.serving import Serving, kv_bytes_per_token, serving_needs
from trainer.estimate.shape import shape_of


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same main memory wherever the tests run: offload would fit on a larger machine."""
    monkeypatch.setattr("trainer.estimate.room.available_memory", lambda: 8 * GIB)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    line = {"messages": [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是演示助手。"}]}
    file.write_text((json.dumps(line) + "\n") * 40, encoding="utf-8")
    return file


@pytest.fixture
def seven(blank_model: Path, tmp_path: Path) -> Path:
    """Qwen2-7B's shape without weights, with a tokenizer of its own."""
    folder = folder_of(QWEN2_7B, tmp_path / "seven")
    for file in blank_model.iterdir():
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def estimate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main(["estimate", *map(str, words)])
    return code, capsys.readouterr().out


def test_a_small_run_fits_this_machine(
    tiny_model: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--home", home.path, f"model={tiny_model}", f"data={rows}", "max_length=64")
    code, told = estimate(capsys, *words)
    assert code == 0
    assert "fits: " in told and "the largest of your rows" in told and "2N rule" in told
    code, told = estimate(capsys, "--json", *words)
    found = json.loads(told)
    assert code == 0 and found["fits"] and sum(found["parts"].values()) == found["bytes"]
    assert found["pass"]["width"] <= 512


def test_the_ladder_is_walked_to_the_first_rung_that_fits(
    seven: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--home", home.path, "--no-data", "--json", f"model={seven}", f"data={rows}", "finetuning_type=full")
    code, told = estimate(capsys, *words, "--gpus", "8x80GB")
    found = json.loads(told)
    assert code == 0 and not found["fits"]
    fitting = [rung["name"] for rung in found["rungs"] if rung["fits"]]
    assert found["first_fit"] == fitting[0] == "zero1"
    code, told = estimate(capsys, *words, "--gpus", "1x8GB")
    assert code == 6 and json.loads(told)["first_fit"] is None


def test_what_does_not_fit_is_told_with_a_cure(
    seven: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--home", home.path, "--no-data", f"model={seven}", f"data={rows}", "--gpus", "1x12GB")
    code, told = estimate(capsys, *words)
    assert code == 6
    assert "does not fit, because" in told
    assert "finetuning_type=qlora" in told


def test_serving_by_hand(seven: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(QWEN2_7B)
    assert shape
    assert kv_bytes_per_token(shape, "bf16") == 2 * 28 * 4 * 128 * 2 == 57_344
    needs = serving_needs(shape, Serving(4096, 16, "bf16", "fp8"), num_gpus=1)
    assert needs.parts["KV cache"] == 28_672 * 4096 * 16
    assert needs.parts["weights"] == 2 * 7_615_616_512
    words = ("--home", home.path, "--serve", "--context", 4096, "--concurrency", 16, seven)
    code, told = estimate(capsys, *words, "--gpus", "1x24GB")
    assert code == 0 and "56.0 KiB per token" in told
    assert estimate(capsys, *words, "--gpus", "1x12GB")[0] == 6
    assert estimate(capsys, *words, "--gpus", "1x12GB", "--dtype", "nf4")[0] == 0


def test_a_short_model_is_served_as_long_as_it_is(
    tiny_model: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = estimate(capsys, "--home", home.path, "--serve", f"model={tiny_model}")
    assert code == 0 and "8 conversations of 256 tokens" in told


def test_every_gpu_has_a_context_of_its_own() -> None:
    shape = shape_of(QWEN2_7B)
    assert shape
    asked = Serving(4096, 16)
    one, two = (serving_needs(shape, asked, num_gpus=count) for count in (1, 2))
    assert two.parts["reserve"] - one.parts["reserve"] == pytest.approx(1.03 * CUDA_CONTEXT, abs=1)


def test_bad_words_are_named(seven: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--serve", "--kv-dtype", "fp7", str(seven)], "--kv-dtype fp7"),
        (["--serve", "--context", "99999999", str(seven)], "32768 positions"),
        (["--serve", "--gpus", "many", str(seven)], "--gpus many"),
        (["--serve"], "--serve needs one model"),
        (["--serve", "--probe", "3", str(seven)], "--probe: goes without --serve"),
        (["--context", "64", f"model={seven}"], "--context: goes with --serve"),
        (["--probe", "3", "--gpus", "1x24GB", f"model={seven}"], "--probe: its steps run on this machine"),
    ):
        assert main(["estimate", "--home", str(home.path), *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "count", "size"), [("2x24GB", 2, 24), ("80GB", 1, 80), ("4 × 16", 4, 16)])
def test_gpus_are_named_as_people_name_them(text: str, count: int, size: int) -> None:
    room = named_gpus(text)
    assert (room.num_gpus, room.device) == (count, size * GIB)


@pytest.mark.parametrize("text", ["", "0x24GB", "2x", "24TB"])
def test_other_words_for_gpus_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 2x24GB"):
        named_gpus(text)


def test_training_is_refused_before_anything_is_loaded(seven: Path) -> None:
    """There are no weights in the folder: to load them would be another error."""
    room = Room(0, 20 * GIB, 20 * GIB, "20 GiB")
    config = config_of(finetuning_type="full", gradient_accumulation_steps=1)
    with pytest.raises(
        DoesNotFit, match=r"will not fit: about 1\d\d\.\d GiB .* it fits with .*finetuning_type=lora bf16=true"
    ) as refused:
        check_fits(config, seven, [200] * 32, room)
    assert refused.value.exit_code == 6
    # Without a GPU here, bf16 is not assumed: 4 + 4 + 12 / 8 bytes a number are too much, 4 + 16 / 8 are not.
    gpus = Room(8, 70 * GIB, 400 * GIB, "8 GPUs")
    with pytest.raises(DoesNotFit, match="deepspeed=zero2 is the first rung that fits"):
        check_fits(config, seven, [200] * 32, gpus)


def test_only_a_clear_miss_is_refused(seven: Path, tmp_path: Path) -> None:
    half = folder_of(QWEN2_HALF_B, tmp_path / "half")
    config = config_of(finetuning_type="full", gradient_accumulation_steps=1)
    check_fits(config, half, [100] * 32, Room(0, 7 * GIB, 7 * GIB, "7 GiB"))  # about 8 are estimated
    with pytest.raises(DoesNotFit):
        check_fits(config, half, [100] * 32, Room(0, 5 * GIB, 5 * GIB, "5 GiB"))
    off = config_of(finetuning_type="full", gradient_accumulation_steps=1, memory_check=False)
    check_fits(off, half, [100] * 32, Room(0, GIB, GIB, "1 GiB"))


def test_train_ends_with_6(
    seven: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's memory is the only thing that is made smaller here."""
    monkeypatch.setattr("trainer.estimate.room.available_memory", lambda: 2 * GIB)
    (seven / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    words = [f"model={seven}", f"data={rows}", "finetuning_type=full", "plot_loss=false", "disable_tqdm=true"]
    assert main(["train", "--home", str(home.path), *words]) == 6
    assert "this run will not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_the_probe_measures_steps_and_memory(
    tiny_model: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--home", home.path, "--probe", 4, "--json", f"model={tiny_model}", f"data={rows}", "max_length=64")
    code, told = estimate(capsys, *words, "gradient_accumulation_steps=2")
    found = json.loads(told)["probe"]
    assert code == 0
    assert found["steps"] == 4 and found["steps_per_epoch"] == 20 and found["steps_in_all"] == 60
    assert found["step_s"] > 0 and found["epoch_s"] == pytest.approx(20 * found["step_s"])
    assert found["peak_bytes"] > 100 << 20
