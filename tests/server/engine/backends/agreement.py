"""What stock transformers and PEFT write greedily, and whether another text agrees with it.

Two implementations agree when they pick the same greedy token wherever the reference's two best tokens are clearly
apart (float32: 1e-3 nat). Knows nothing about backends.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

CLEAR_GAP = 1e-3  # nat


@dataclass(frozen=True)
class Reference:
    """A greedy text and, at each place, the distance in nats between the two most likely tokens."""

    token_ids: list[int]
    gaps: list[float]


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> Reference:
    """Exactly `num_tokens` by the `generate` of a transformers or PEFT model. PEFT's refusals pass through."""
    with warnings.catch_warnings():
        # transformers' generate sends position ids; PEFT drops them and says so.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        result = model.generate(
            input_ids=torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=model.config.vocab_size,  # never: run to the full length
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tops = torch.stack([logits[0].float().log_softmax(-1).topk(2).values for logits in result.logits])
    return Reference(result.sequences[0, -num_tokens:].tolist(), (tops[:, 0] - tops[:, 1]).tolist())


def assert_agrees(reference: Reference, ours: Sequence[int], what: str = "") -> int:
    """How many tokens were really compared: up to the first place where an unclear choice parted the texts.

    Fails where a clear choice differs, and where fewer than two thirds could be compared.
    """
    expected = reference.token_ids
    assert len(ours) == len(expected), f"{what}: {len(ours)} tokens instead of {len(expected)}"
    num_compared = len(expected)
    for place, (mine, theirs, gap) in enumerate(zip(ours, expected, reference.gaps, strict=True)):
        if mine != theirs:
            assert gap <= CLEAR_GAP, f"{what}: token {place} is {mine} instead of {theirs}, gap {gap:.4f} nat"
            num_compared = place
            break
    assert 3 * num_compared >= 2 * len(expected), f"{what}: only {num_compared} of {len(expected)} tokens say anything"
    return num_compared
