"""How far two copies of one model are apart: logits of a few fixed prompts. Knows nothing of merging or quantizing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from server.text.render import ChatRenderer

PROMPTS = ("你好，请介绍一下你自己。", "What is the capital of France?", "1 + 1 =")


def prompt_ids(model: Path) -> list[list[int]]:
    """The prompts by the tokenizer in the folder `model`."""
    tokenizer = ChatRenderer.load(model).tokenizer
    return [tokenizer.encode_plain(text) for text in PROMPTS]


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 `[tokens of all prompts, V]`."""
    model.eval()
    rows = []
    for ids in prompts:
        token_ids = torch.tensor([list(ids)], device=model.device)
        rows.append(model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False).logits[0])
    return torch.cat(rows).float().cpu()


def largest_gap(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max())


def same_tokens(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Share of places where the most likely token is the same."""
    return float((expected.argmax(-1) == found.argmax(-1)).float().mean())
