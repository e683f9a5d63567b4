"""Model folders: what loads, as what, and what is refused with which words."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.backends.hf import HfBackend, HfOptions
from server.errors import ConfigError
from tests.server.engine.backends.driver import ask, run
from tests.server.engine.backends.folders import IM_END, MAX_POSITIONS, write_model


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "no such folder"),
    "empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "truncated weights": (cut_short, "truncated"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
    "unknown architecture": (edit_config(model_type="nonesuch"), "nonesuch"),
    "a tensor is missing": (drop_a_tensor, "lack 1 tensors"),
    "shapes differ from the config": (edit_config(intermediate_size=96), "cannot be loaded"),
    "angles that move": (
        edit_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "dynamic",
    ),
    "not a causal language model": (edit_config(model_type="t5", architectures=["T5Model"]), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_folder_is_a_config_error(fault: str, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        HfBackend(HfOptions(folder, "tiny")).load()
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "wanted", "runs"),
    [
        (torch.float32, "auto", "fp32"),
        (torch.bfloat16, "auto", "bf16"),
        (torch.float16, "auto", "bf16"),
        (torch.bfloat16, "fp32", "fp32"),
        (torch.float32, "bf16", "bf16"),
    ],
)
def test_dtype(saved: torch.dtype, wanted: Any, runs: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path, saved)
    backend = HfBackend(HfOptions(folder, "tiny", dtype=wanted, kv_cache_gib=0.01))
    with caplog.at_level(logging.INFO):
        model = backend.load()
    assert model.dtype == runs
    assert ("bfloat16" in caplog.text) == (saved is torch.float16)
    assert len(run(backend, ask([1, 2, 3], max_tokens=5, ignore_eos=True))["a", 0].token_ids) == 5
    backend.close()


def test_context_is_the_smallest_of_all_limits(model_folder: Path) -> None:
    bytes_per_token = 2 * 2 * 2 * 16 * 4
    cases = [({}, MAX_POSITIONS), ({"max_model_len": 100}, 100), ({"max_model_len": 9}, 9)]
    cases.append(({"kv_cache_gib": 150 * bytes_per_token / 2**30}, 128))  # whole pages
    for options, expected in cases:
        assert HfBackend(HfOptions(model_folder, "tiny", **options)).load().max_model_len == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kv_cache_gib": 0.0}, "QLOOP_KV_CACHE_GIB=0 holds 0 tokens"),
        ({"kv_cache_gib": 1e-4, "max_model_len": 300}, "QLOOP_KV_CACHE_GIB=0.0001 holds 192 tokens"),
        ({"max_model_len": 9999}, "has 512 positions"),
    ],
)
def test_a_context_that_cannot_be_had_is_a_config_error(
    model_folder: Path, options: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        HfBackend(HfOptions(model_folder, "tiny", **options)).load()  # type: ignore[arg-type]


def test_stop_ids_come_from_both_files(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    edit_config(eos_token_id=[7, IM_END])(folder)
    assert HfBackend(HfOptions(folder, "tiny")).load().stop_token_ids == (IM_END, 7)
    (folder / "generation_config.json").unlink()
    assert HfBackend(HfOptions(folder, "tiny")).load().stop_token_ids == (7, IM_END)
