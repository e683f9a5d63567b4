"""Can a model keep packed examples apart? Asked of the model itself, on a few random tokens.

Families differ: some have no positions to give, some build their own mask. A model that mixes examples would train on
nonsense without any error. Knows nothing of the run.
"""

from typing import Any

import torch

FIRST, SECOND = 5, 7  # lengths of the two examples


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """True if the second of two packed examples does not see the first one, and has the logits it has alone."""
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False  # virtual tokens would stand before the first example only
    was_training = model.training
    model.eval()
    try:
        return _is_isolated(model)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return False  # takes no positions, or not in this way
    finally:
        model.train(was_training)


def _is_isolated(model: Any) -> bool:
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    most = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, most, (3, FIRST + SECOND), generator=generator).to(device)
    tokens[1, FIRST:] = tokens[0, FIRST:]  # another first example, the same second one
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).to(device)
    packed = [model(input_ids=row[None], position_ids=positions[None], use_cache=False).logits[0] for row in tokens[:2]]
    alone = model(input_ids=tokens[:1, FIRST:], use_cache=False).logits[0].float()
    first, second = (logits[FIRST:].float() for logits in packed)
    size = float(alone.abs().max())
    # Masked weights are exactly 0, so only rounding of equal sums may differ; alone, shapes differ, too.
    loose = 1e-4 if packed[0].dtype == torch.float32 else 0.05
    seen = float((first - second).abs().max())
    moved = float((first - alone).abs().max())
    return seen <= 1e-3 * loose * size and moved <= loose * size
