"""A reward model (stage rm) as a function: whole conversations as token ids -> one score each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from server.errors import ConfigError
from server.store.home import Home
from trainer.config import TrainConfig
from trainer.methods.base_model import DTYPES, load_base
from trainer.options.arguments import gpu_has_bf16
from trainer.options.precision import reward_format
from trainer.stages.reward_source import RewardSource, find_reward


def load_reward(config: TrainConfig, home: Home) -> Callable[[list[list[int]]], Tensor]:
    """Raises ConfigError when `reward_model` is neither a finished rm run nor a folder of a scoring model."""
    return Reward(_load(find_reward(config, home), config))


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


def _load(source: RewardSource, config: TrainConfig) -> Any:
    dtype = DTYPES[reward_format(config, gpu_has_bf16=gpu_has_bf16())]
    options: dict[str, Any] = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1, "dtype": dtype}
    if source.adapter is None:
        # A random head would score by chance.
        return _checked(load_base(source.model, **options, new_head=()), source.folder)
    from peft import PeftModel

    base = load_base(source.model, **options)
    return _checked(PeftModel.from_pretrained(base, str(source.adapter)), source.folder)


def _checked(model: Any, folder: Path) -> Any:
    if model.config.pad_token_id is None:
        raise ConfigError(f"{folder}: its config.json has no pad_token_id, without which answers cannot be scored")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
