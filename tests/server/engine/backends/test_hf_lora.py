"""Adapter folders: what is read right, what is refused and with which words."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.lora import LoraLayers
from server.engine.backends.hf.lora_files import read_lora
from tests.server.engine.backends.folders import load_reference, write_adapter, write_model

PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 6}, "alpha_pattern": {"down_proj": 1}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def good(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), model_folder)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return load_reference(model_folder)


@torch.inference_mode()
def forward(model: Any, token_ids: list[list[int]]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor(token_ids)).logits
    return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, PATTERNS, {"target_modules": ["lm_head", "q_proj"]}, {"r": 1, "lora_alpha": 3}],
    ids=["plain", "rslora", "patterns", "lm_head", "rank 1"],
)
def test_logits_equal_peft(model_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path, model_folder, **options)
    mine = load_reference(model_folder)
    layers = LoraLayers(mine)
    layers.attach("x", read_lora(folder, mine))
    layers.set_rows([0])
    stock = PeftModel.from_pretrained(load_reference(model_folder), str(folder)).eval()
    expected = forward(stock, [[1, 2, 3, 4]])
    torch.testing.assert_close(forward(mine, [[1, 2, 3, 4]]), expected, atol=2e-3, rtol=1e-4)
    assert (expected - forward(load_reference(model_folder), [[1, 2, 3, 4]])).abs().max() > 0.1


def test_base_rows_are_untouched_to_the_bit(model: Any, good: Path) -> None:
    layers = LoraLayers(model)
    tokens = [[1, 2, 3], [4, 5, 6]]
    plain = forward(model, tokens)
    layers.attach("x", read_lora(good, model))
    layers.set_rows([-1, 0])
    mixed = forward(model, tokens)
    layers.set_rows([-1, -1])
    assert torch.equal(forward(model, tokens), plain)
    layers.detach("x")
    assert torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[1], plain[1])


def test_adapter_that_overflows_does_not_spoil_other_rows(model: Any, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "copy")
    edit_tensors(lambda t: {k: v.sign() * 3e38 if "lora_A" in k else v for k, v in t.items()})(folder)
    layers = LoraLayers(model)
    plain = forward(model, [[1, 2, 3], [4, 5, 6]])
    layers.attach("wild", read_lora(folder, model))
    layers.set_rows([-1, 0])
    mixed = forward(model, [[1, 2, 3], [4, 5, 6]])
    layers.detach("wild")
    assert torch.equal(mixed[0], plain[0]) and mixed[1].isnan().any()


def test_slots_are_reused_and_the_rest_stays(model_folder: Path, tmp_path: Path, model: Any) -> None:
    folders = [write_adapter(tmp_path / str(i), model_folder, seed=i, r=2 + i) for i in range(3)]
    layers = LoraLayers(model)
    for i, folder in enumerate(folders):
        layers.attach(str(i), read_lora(folder, model))
    layers.set_rows([layers.slots["2"]])
    before = forward(model, [[1, 2, 3]])
    layers.detach("1")
    layers.attach("again", read_lora(folders[1], model))
    assert layers.slots == {"0": 0, "2": 2, "again": 1}
    layers.set_rows([2])
    torch.testing.assert_close(forward(model, [[1, 2, 3]]), before, atol=1e-4, rtol=1e-4)
    for name in ("0", "again", "2"):
        layers.detach(name)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)

    return edit


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "config is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "as JSON"),
    "config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "LORA only"),
    "config without rank": (edit_config(r=None), "r and lora_alpha"),
    "another method": (edit_config(peft_type="IA3"), "'IA3'"),
    "DoRA": (edit_config(use_dora=True), "use_dora"),
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (edit_config(bias="all"), "bias='all'"),
    "lora_bias": (edit_config(lora_bias=True), "lora_bias"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickled weights": (only_pickle, "never read"),
    "truncated": (cut_short, "cut short or damaged"),
    "empty file": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "cut short"),
    "no tensors": (edit_tensors(lambda tensors: {}), "no LoRA weights"),
    "B is missing": (edit_tensors(lambda t: {k: v for k, v in t.items() if k == FIRST}), "only lora_A"),
    "not a LoRA tensor": (
        edit_tensors(lambda t: t | {"model.x.lora_embedding_A": t[FIRST].clone()}),
        "embedding",
    ),
    "unknown module": (
        edit_tensors(lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}),
        "no module 'model.layers.9",
    ),
    "not a linear layer": (edit_tensors(lambda t: {k.replace(".q_proj", ""): v for k, v in t.items()}), "not a linear"),
    "wrong shape": (edit_tensors(lambda t: t | {FIRST: t[FIRST][:, :-1].contiguous()}), "another base model"),
    "rank differs from the config": (edit_config(r=5), "rank 5"),
    "NaN": (edit_tensors(lambda t: t | {FIRST: t[FIRST] * float("nan")}), "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folder_is_refused_with_its_path(fault: str, model: Any, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "copy")
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        read_lora(folder, model)
    assert words in str(caught.value) and str(folder) in str(caught.value)


def test_folder_of_another_peft_method_is_refused(model_folder: Path, model: Any, tmp_path: Path) -> None:
    other = get_peft_model(load_reference(model_folder), LoHaConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="LOHA"):
        read_lora(tmp_path, model)


def test_untrained_adapter_is_served_with_a_warning(
    model_folder: Path, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_adapter(tmp_path, model_folder, scale=0.0)
    with caplog.at_level(logging.WARNING):
        assert read_lora(folder, model)
    assert "changes nothing" in caplog.text
