"""Log-probabilities as API clients see them: of the model's raw distribution, before anything a sampler does to it."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.messages import TokenLogprobs


def token_logprobs(
    logits: Tensor, token_ids: Seq[int], counts: Seq[int], given: Seq[tuple[int, ...]]
) -> list[TokenLogprobs]:
    """One entry per row of `logits` (`[B, V]`, raw): its `token_ids[row]`, the `counts[row]` most likely ids and the
    `given[row]` ids. rank = 1 + the number of ids that are strictly more likely."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks: list[int] = ((logprobs > chosen).sum(-1) + 1).tolist()
    top = logprobs.topk(min(max(counts), logprobs.shape[-1]))
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprobs(
            token_id=token_ids[row],
            logprob=value,
            rank=ranks[row],
            top_token_ids=top_ids[row][: counts[row]],
            top_logprobs=top_values[row][: counts[row]],
            given_logprobs=logprobs[row, list(given[row])].tolist() if given[row] else [],
        )
        for row, value in enumerate(chosen[:, 0].tolist())
    ]
