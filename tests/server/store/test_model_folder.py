import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import (
    INDEX_NAME,
    check_model_folder,
    default_served_name,
    num_weights,
    read_model_config,
    resolve_model,
)
from tests.server.store.safetensors_files import write_adapter, write_model, write_safetensors


def test_a_whole_model_folder_passes(tmp_path: Path) -> None:
    check_model_folder(write_model(tmp_path / "m"))


def test_a_sharded_model_needs_every_shard(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"weight": "model-1.safetensors", "other": "model-2.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-2\.safetensors"):
        check_model_folder(folder)
    write_safetensors(folder / "model-2.safetensors")
    check_model_folder(folder)
    assert num_weights(folder) == 2 * num_weights(write_model(tmp_path / "whole")) > 0


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_safetensors(tmp_path / "outside.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"weight": "../outside.safetensors"}}))
    with pytest.raises(ConfigError, match="missing"):
        check_model_folder(folder)


def test_truncated_weights_are_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            check_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not a model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "save_pretrained"),
        (lambda folder: (folder / "model.safetensors").unlink(), "download the model again"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "Convert"),
        (lambda folder: (folder / INDEX_NAME).write_text("{}"), "weight_map"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_model(tmp_path / "m")
    change(folder)
    with pytest.raises(ConfigError, match=message):
        check_model_folder(folder)


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter, not a base model"):
        check_model_folder(write_adapter(tmp_path / "a"))


def test_models_are_found_by_path_and_by_name_in_the_home(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    folder = write_model(home.models / "mine")
    assert resolve_model(str(folder), home) == folder
    assert resolve_model("mine", home) == folder
    assert read_model_config(resolve_model("mine", home))["model_type"] == "qwen2"


@pytest.mark.parametrize("model", ["missing", "/no/such/folder", "a/b/c", "../x/..", ""])
def test_a_missing_folder_is_an_error_with_a_cure(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "":
        model = "  "
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_model(model, Home(tmp_path / "home"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(str(write_safetensors(tmp_path / "model.safetensors")), Home(tmp_path))


def test_a_hub_id_without_network_is_an_error_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"Org/Name: is no local folder, and could not be downloaded .*HF_ENDPOINT"):
        resolve_model("Org/Name", Home(tmp_path))


def test_served_names_come_from_folder_or_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_model(tmp_path / "here"))
    assert default_served_name("Qwen/Qwen2-7B-Instruct") == "Qwen2-7B-Instruct"
    assert default_served_name("/models/mine/") == "mine"
    assert default_served_name(".") == "here"
    with pytest.raises(ConfigError, match="QLOOP_SERVED_MODEL_NAME"):
        default_served_name("/models/我的模型")


def test_modelscope_is_asked_where_the_ecosystem_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install modelscope"):
        resolve_model("Qwen/Qwen2-0.5B", Home(tmp_path))
    asked = []

    def download(model: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((model, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=download))
    assert resolve_model("Qwen/Qwen2-0.5B", Home(tmp_path), revision="v1") == tmp_path
    resolve_model("Qwen/Qwen2-0.5B", Home(tmp_path), with_weights=False)
    assert asked == [
        ("Qwen/Qwen2-0.5B", "v1", ["*.safetensors", "*.json", "*.jinja", "*.txt"]),
        ("Qwen/Qwen2-0.5B", None, ["*.json", "*.jinja", "*.txt"]),
    ]
