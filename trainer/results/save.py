"""What a run leaves: a whole model folder, or an adapter folder with its card. Written aside, then renamed.

Safetensors only. A folder of the final name is always whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from server.store.card import AdapterCard, write_card
from server.store.hashes import write_json
from server.store.model_folder import read_json_object
from server.store.registry import CONFIG_NAME, WEIGHTS_NAME
from trainer.methods.base_model import saved_dtype
from trainer.results.text_files import copy_text_files

TRAINED = "default"  # PEFT's name for an adapter that was given none
MakeCard = Callable[[Mapping[str, Any]], AdapterCard]
StateDict = Mapping[str, torch.Tensor]


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when the block ends well, and is gone when it does not."""
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            file.chmod(0o644)  # weights are written for their owner only; a server may run as another user
        replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_model(model: Any, base: Path, target: Path, *, state_dict: StateDict | None = None) -> None:
    """All weights in the dtype of `base`, its text files beside them. `state_dict` if the weights lie elsewhere."""
    with written_aside(target) as aside:
        write_model(model, base, aside, state_dict)


def write_model(model: Any, base: Path, folder: Path, state_dict: StateDict | None = None) -> None:
    """As `save_model`, straight into `folder`."""
    dtype = saved_dtype(base)
    weights = model.state_dict() if state_dict is None else _tied_again(model, state_dict)
    model.save_pretrained(folder, state_dict=_cast(weights, dtype))
    config = read_json_object(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    copy_text_files(base, folder)


def save_adapter(
    model: Any, base_name: str, target: Path, *, card: MakeCard | None = None, state_dict: StateDict | None = None
) -> None:
    """A PEFT model's adapter; `card` makes its card from adapter_config.json. Embeddings are not saved.

    Someone who wants embeddings trained and saved names them in peft_config's modules_to_save.
    """
    with written_aside(target) as aside:
        # Not the frozen copy that TRL keeps beside it while it trains.
        model.save_pretrained(
            str(aside), save_embedding_layers=False, state_dict=state_dict, selected_adapters=[TRAINED]
        )
        (aside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        first = getattr(model, "first_lora", None)
        if first is not None:
            _subtract_first(aside, first)
        _tidy(aside / CONFIG_NAME, base_name)
        if card is not None:
            write_card(aside, card(read_json_object(aside / CONFIG_NAME)))


def replace_folder(new: Path, target: Path) -> None:
    """`new` takes the place of `target` by renaming; a server that has the old one open keeps it."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _tied_again(model: Any, weights: StateDict) -> StateDict:
    """Gathered weights, where those that are one parameter of the model are one tensor: a tied head is saved once."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(one), name) for name, one in model.named_parameters(remove_duplicate=False)}
    return {name: weights[names.get(name, name)] for name in weights}


def _cast(weights: StateDict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point weights in `dtype`; tensors that share memory still do."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, weight in weights.items():
        key = (weight.data_ptr(), weight.shape)
        if key not in done:
            done[key] = weight.to(dtype) if weight.is_floating_point() else weight
        result[name] = done[key]
    return result


def _subtract_first(folder: Path, first: StateDict) -> None:
    """PiSSA took A0 and B0 out of the base: B A - B0 A0 = [B, -B0] [A; A0], a plain LoRA on the base as it was."""
    tensors = load_file(folder / WEIGHTS_NAME)
    start = {name.replace(".default.", "."): weight for name, weight in first.items()}
    for name, weight in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([weight, start[name].to(weight.dtype)], dim=0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([weight, -start[name].to(weight.dtype)], dim=1)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = read_json_object(folder / CONFIG_NAME)
    # The scale alpha / r, or alpha / sqrt(r), stays what it was.
    factor = 2**0.5 if config.get("use_rslora") else 2
    write_json(
        folder / CONFIG_NAME,
        {**config, "r": 2 * config["r"], "lora_alpha": config["lora_alpha"] * factor, "init_lora_weights": True},
    )


def _tidy(path: Path, base_name: str) -> None:
    """No machine's path and no set order in it, so that equal adapters have equal revisions."""
    value = read_json_object(path)
    value["base_model_name_or_path"] = base_name
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        if isinstance(value.get(key), list):
            value[key] = sorted(value[key])
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
