"""Finding and checking base models on disk. Reads file names, JSON and headers; never loads weights or runs code."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.settings import MODELSCOPE_VARIABLE, uses_modelscope
from server.store.home import Home
from server.store.names import NameRefused, check_name
from server.store.safetensors_check import BrokenFile, read_header

TEXT_PATTERNS = ("*.json", "*.jinja", "*.txt")
DOWNLOAD_PATTERNS = ("*.safetensors", *TEXT_PATTERNS)
INDEX_NAME = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def resolve_model(model: str, home: Home, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """The local folder of `model`: a folder, a model's name under `<home>/models`, or a hub id `Org/Name`.

    A hub id is downloaded through huggingface_hub (safetensors, JSON, templates; never pickle) into its own cache; not
    `with_weights`: all but the weights, for who only reads the configuration and the tokenizer.
    Raises ConfigError when there is no such folder, or when the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise ConfigError(f"{model} is a file; give the model's folder (the one with config.json)")
    if (named := _named_folder(model, home)) is not None:
        return named
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"{model}: no such folder. Give a model folder's path or a hub id such as Qwen/Qwen2-7B-Instruct"
        )
    return _download(model, revision, DOWNLOAD_PATTERNS if with_weights else TEXT_PATTERNS)


def default_served_name(model: str) -> str:
    """The API's name of a base model when none is set: its folder's name, or the last part of its hub id."""
    name = Path(model).expanduser().name or Path(model).expanduser().resolve().name
    try:
        return check_name(name)
    except NameRefused as error:
        raise ConfigError(f"{error}. Set QLOOP_SERVED_MODEL_NAME to choose another name") from None


def read_model_config(path: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ConfigError when it is missing or not a JSON object."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path}: no config.json, so this is not a model folder")
    config = read_json_object(file)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{file}: has no model_type, so this is not a transformers model")
    return config


def saved_format(config: Mapping[str, Any]) -> str:
    """The number format of the weights that a config.json names, by torch's name; float32 where it names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def num_positions(config: Mapping[str, Any]) -> int | None:
    """The longest context that a config.json names, under any of its names; None where it names none."""
    found = config.get("max_position_embeddings") or config.get("n_positions") or config.get("seq_length")
    return found if isinstance(found, int) else None


def check_model_folder(path: Path) -> None:
    """Raise ConfigError, with the cure, unless the folder has all that serving needs and its weights are whole."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds an adapter, not a base model: publish it and set QLOOP_MODEL to its base")
    read_model_config(path)
    for file in _weight_files(path):
        try:
            read_header(file)
        except BrokenFile as error:
            raise ConfigError(str(error)) from None
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(
            f"{path}: no tokenizer.json. Make it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a file that must hold one JSON object. Raises ConfigError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a JSON object is expected")
    return value


def _named_folder(model: str, home: Home) -> Path | None:
    try:
        folder = home.models / check_name(model)
    except NameRefused:
        return None
    return folder.resolve() if folder.is_dir() else None


def num_weights(path: Path) -> int:
    """How many numbers a model folder's weights have, by their headers: its parameters, unless they are packed.

    0 for the fake engine's folders, which have no weights.
    """
    files = _weight_files(path) if any(path.glob("*.safetensors")) else []
    tensors = (tensor for file in files for tensor in read_header(file).values())
    total: int = sum(math.prod(tensor["shape"]) for tensor in tensors)
    return total


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_NAME
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ConfigError(f"{index}: has no weight_map; copy or download it again")
        names = sorted({str(name) for name in shards.values()})
        missing = [name for name in names if Path(name).name != name or not (path / name).is_file()]
        if missing:
            raise ConfigError(f"{path}: weights are missing: {', '.join(missing)}. Copy or download them again")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise ConfigError(f"{path}: pickled weights are not loaded. Convert the model to safetensors first")
    raise ConfigError(f"{path}: no *.safetensors weights; copy or download the model again")


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    snapshot_download = _snapshot_download(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # its errors share no base class: OSError, ValueError and HTTP client errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{model}: is no local folder, and could not be downloaded ({type(error).__name__}: {reason[:300]}). "
            "Check the name and the network (HF_ENDPOINT, HF_TOKEN), or give a folder's path"
        ) from None


def _snapshot_download(model: str) -> Any:
    """ModelScope's function has the same arguments. Raises ConfigError where it is asked for and not installed."""
    if not uses_modelscope():
        from huggingface_hub import snapshot_download

        return snapshot_download
    try:
        from modelscope import snapshot_download as from_modelscope
    except ImportError:
        raise ConfigError(
            f"{model}: {MODELSCOPE_VARIABLE} is set, but ModelScope's client is not installed. "
            "Run `pip install modelscope`, or unset it to use huggingface_hub (and HF_ENDPOINT for a mirror)"
        ) from None
    return from_modelscope
