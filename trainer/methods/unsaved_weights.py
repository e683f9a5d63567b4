"""Trained weights that peft leaves out of a checkpoint.

Of a prompt encoder peft saves only the prompt that it computes: enough to serve it, not enough to go on training it.
The value head of stage ppo is no part of an adapter at all.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE = "unsaved_weights.safetensors"
_UNSAVED = ("prompt_encoder.", "value_head.")


def save_unsaved_weights(model: Any, checkpoint: Path) -> None:
    """Does nothing where peft's own files, or the model's, hold everything."""
    found = {name: weight.detach().cpu().contiguous() for name, weight in _unsaved(model)}
    if found:
        save_file(found, checkpoint / FILE)


def load_unsaved_weights(model: Any, checkpoint: Path) -> None:
    """Put them back, if the checkpoint has them."""
    if not (checkpoint / FILE).is_file():
        return
    saved = load_file(checkpoint / FILE)
    with torch.no_grad():
        for name, weight in _unsaved(model):
            weight.copy_(saved[name])


def _unsaved(model: Any) -> list[tuple[str, torch.Tensor]]:
    """By name, not by what is trained: peft freezes an adapter that it loads as the best one."""
    if not hasattr(model, "peft_config"):
        return []
    return [(name, weight) for name, weight in model.named_parameters() if name.startswith(_UNSAVED)]
