"""What one training run can be told: declared once, it gives the help text, the checks and `run.json`.

Values come from a JSON or YAML file and from `key=value` words, the words on top. An unknown key is refused.
"""

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from server.errors import ConfigError
from server.settings import home_path


def _option(text: str, default: Any = None, *, least: float | None = None, most: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Learning rates and sizes follow common practice for small LoRA runs; name your own where it matters."""

    model: str = _option("Base model: a folder, the name of a model in the home, or a hub id.", "")
    data: tuple[str, ...] = _option("Training files (.jsonl or .json), a list or comma-separated.", ())
    stage: Literal["pt", "sft"] = _option("pt: predict all of plain text. sft: learn the assistant's turns.", "sft")
    finetuning: Literal["full", "lora"] = _option("full: all weights. lora: small matrices beside them.", "lora")
    from_scratch: bool = _option("Start from random weights; the model folder then needs only its config.json.", False)
    run_id: str | None = _option("Name of the run folder. Unset: time and stage.")
    num_epochs: float = _option("Passes over the data.", 3.0, least=0.0)
    learning_rate: float = _option("Highest learning rate.", 1e-4, least=0.0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = _option("How the learning rate falls.", "cosine")
    warmup_ratio: float = _option("Share of the steps in which the learning rate rises.", 0.05, least=0.0, most=1.0)
    weight_decay: float = _option("AdamW's weight decay.", 0.0, least=0.0)
    adam_beta2: float = _option(
        "AdamW's memory of squared gradients; 0.95 suits short runs.", 0.999, least=0.0, most=1.0
    )
    max_grad_norm: float = _option("Gradients are clipped to this norm.", 1.0, least=0.0)
    batch_size: int = _option("Rows per forward pass.", 8, least=1)
    gradient_accumulation: int = _option("Forward passes per optimizer step.", 1, least=1)
    max_length: int = _option(
        "Longest row in tokens; longer ones go to the ledger (pt: text is cut here).", 1024, least=2
    )
    precision: Literal["auto", "fp32", "bf16"] = _option("auto: bf16 where a GPU has it, else fp32.", "auto")
    attention: Literal["auto", "sdpa", "eager"] = _option(
        "auto: sdpa. eager keeps the whole score matrix, which on a CPU is faster for rows of a few hundred tokens.",
        "auto",
    )
    lora_rank: int = _option("Rank of the LoRA matrices.", 8, least=1)
    lora_alpha: int = _option("LoRA's scale is alpha / rank.", 16, least=1)
    lora_dropout: float = _option("Dropout before the LoRA matrices.", 0.0, least=0.0, most=1.0)
    seed: int = _option("The same seed on the same machine gives the same weights.", 42, least=0)
    logging_steps: int = _option("Steps between two lines of metrics.jsonl.", 10, least=1)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is not set: name a folder or a hub id, for example model=Qwen/Qwen2-0.5B-Instruct")
        if not self.data:
            raise ConfigError("data is not set: name one or more .jsonl or .json files, for example data=train.jsonl")
        if self.from_scratch and self.finetuning == "lora":
            raise ConfigError("from_scratch=true needs finetuning=full: LoRA on random weights learns nothing of use")


def default_home() -> Path:
    """QLOOP_HOME as the server resolves it."""
    return home_path()


def load_config(file: Path | None, words: Sequence[str] = ()) -> TrainConfig:
    """Merge a config file and `key=value` words. Raises ConfigError naming the key and what it accepts."""
    values = _read_file(file) if file else {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: options are written key=value, for example num_epochs=3")
        values[key.replace("-", "_")] = text
    return config_from(values)


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Check and convert raw values. Raises ConfigError for unknown keys, wrong types and values out of range."""
    known = {f.name: f for f in fields(TrainConfig)}
    hints = get_type_hints(TrainConfig)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`python -m trainer train --help` lists all options"
            raise ConfigError(f"unknown option {key!r}: {hint}")
    converted = {key: _convert(key, value, hints[key]) for key, value in values.items()}
    for key, value in converted.items():
        _check_range(key, value, known[key].metadata)
    return TrainConfig(**converted)


def describe_options() -> str:
    """One line per option: name, default, meaning."""
    lines = []
    for option in fields(TrainConfig):
        shown = "unset" if option.default in (None, "", ()) else str(option.default)
        choices = get_args(option.type) if get_origin(option.type) is Literal else ()
        accepted = f" {{{'|'.join(map(str, choices))}}}" if choices else ""
        lines.append(f"  {option.name + accepted:<32} {option.metadata['help']} [{shown}]")
    return "\n".join(lines)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None
    try:
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be parsed ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a mapping of options is expected, for example `stage: sft`")
    return {str(key): item for key, item in value.items()}


def _convert(key: str, value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return None if value is None or value == "" else _convert(key, value, get_args(hint)[0])
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{key}={value!r}: accepted are {', '.join(get_args(hint))}")
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts if part.strip())
        raise ConfigError(f"{key}={value!r}: a list of file names is expected")
    return _convert_scalar(key, value, hint)


def _convert_scalar(key: str, value: Any, kind: type) -> Any:
    if kind is bool:
        accepted: dict[Any, bool] = {True: True, False: False, "true": True, "false": False}
        if isinstance(value, bool | str) and value in accepted:
            return accepted[value]
        raise ConfigError(f"{key}={value!r}: accepted are true and false")
    if kind is str and isinstance(value, str):
        return value
    try:
        # A YAML reader takes 1e-4 for text, so numbers may arrive as strings.
        number = kind(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if kind is str or number is None or (kind is int and isinstance(value, float) and value != number):
        raise ConfigError(f"{key}={value!r}: a value of type {kind.__name__} is expected")
    return number


def _check_range(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    least, most = limits["least"], limits["most"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        too_low = least is not None and not value >= least
        too_high = most is not None and not value <= most
        if too_low or too_high or value == float("inf"):
            bounds = " and ".join(
                f"{word} {limit:g}" for word, limit in (("at least", least), ("at most", most)) if limit is not None
            )
            raise ConfigError(f"{key}={value}: must be {bounds or 'finite'}")
