"""A reward model (stage rm) as a function: whole conversations as token ids -> one score each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from server.errors import ConfigError
from server.store.home import Home
from server.store.model_folder import resolve_model
from trainer.config import TrainConfig
from trainer.methods.base_model import load_base
from trainer.options.arguments import has_bf16
from trainer.runs.run_folder import RECORD, read_run


def load_reward(config: TrainConfig, home: Home) -> Callable[[list[list[int]]], Tensor]:
    """Raises ConfigError when `reward_model` is neither a finished rm run nor a folder of a scoring model."""
    if not config.reward_model:
        raise ConfigError("reward_model is not set: stage=ppo needs the run or folder of a model trained with stage=rm")
    found = [
        path for path in (Path(config.reward_model).expanduser(), home.runs / config.reward_model) if path.is_dir()
    ]
    if not found:
        raise ConfigError(f"reward_model={config.reward_model}: no such run or folder")
    return Reward(_load(found[0], config, home))


class Reward:
    """Calls the model without gradients, padded on the right: it scores the last token that is no padding."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, conversations: list[list[int]]) -> Tensor:
        width = max(map(len, conversations))
        pad = self._model.config.pad_token_id
        tokens = torch.full((len(conversations), width), pad)
        attention = torch.zeros_like(tokens)
        for row, token_ids in enumerate(conversations):
            tokens[row, : len(token_ids)] = torch.tensor(token_ids)
            attention[row, : len(token_ids)] = 1
        device = self._model.device
        scores: Tensor = self._model(input_ids=tokens.to(device), attention_mask=attention.to(device)).logits
        return scores[:, 0].float()


def _load(folder: Path, config: TrainConfig, home: Home) -> Any:
    dtype = torch.bfloat16 if has_bf16(config) else torch.float32
    options: dict[str, Any] = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1, "dtype": dtype}
    if not (folder / RECORD).is_file():
        return _checked(load_base(folder, **options, new_head=()), folder)  # a random head would score by chance
    record = read_run(folder)
    if record.get("state") != "done" or record.get("config", {}).get("stage") != "rm":
        raise ConfigError(f"reward_model={config.reward_model}: this is no finished run of stage=rm")
    if record.get("output") == "model":
        return _checked(load_base(folder / "model", **options, new_head=()), folder)
    from peft import PeftModel

    base = load_base(resolve_model(str(record["base_path"]), home), **options)
    return _checked(PeftModel.from_pretrained(base, str(folder / "adapter")), folder)


def _checked(model: Any, folder: Path) -> Any:
    if model.config.pad_token_id is None:
        raise ConfigError(f"{folder}: its config.json has no pad_token_id, without which answers cannot be scored")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
