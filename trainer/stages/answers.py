"""A batch of answers in stage ppo, and what each of their tokens earned. Tensors only: no model, no loop."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """One batch of answers: tokens [rows, length]; the rest [rows, answer length], where `mask` is True."""

    tokens: Tensor
    attention: Tensor
    mask: Tensor
    log_p: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def parts(self, size: int) -> "list[Answers]":
        """The same, `size` rows each."""
        columns = (torch.split(getattr(self, field.name), size) for field in fields(self))
        return [Answers(*part) for part in zip(*columns, strict=True)]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Generalized advantages [rows, length], undiscounted; nothing follows a row's last masked token."""
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    advantages = torch.zeros_like(rewards)
    for step in reversed(range(rewards.shape[1])):
        here = mask[:, step]
        following = torch.where(
            here, rewards[:, step] + next_value - values[:, step] + decay * following, following * 0
        )
        next_value = torch.where(here, values[:, step], next_value * 0)
        advantages[:, step] = following
    return advantages


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 where masked."""
    mean = masked_mean(values, mask)
    spread = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(spread + 1e-8) * mask
