"""Log-probabilities as API clients see them: of the model's raw distribution, before anything a sampler does to it."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.backends.hf.chunks import chunk_peaks, largest
from server.engine.messages import TokenLogprobs


def token_logprobs(
    logits: Tensor, token_ids: Seq[int], counts: Seq[int], given: Seq[tuple[int, ...]]
) -> list[TokenLogprobs]:
    """One entry per row of `logits` (`[B, V]`, raw): its `token_ids[row]`, the `counts[row]` most likely ids and the
    `given[row]` ids. rank = 1 + the number of ids that are strictly more likely."""
    chosen = logits.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])
    total, ranks = _totals_and_ranks(logits, chosen)
    values: list[float] = (chosen.float() - total)[:, 0].tolist()
    top_values, top_ids = largest(logits, chunk_peaks(logits), max(counts)) if max(counts) else (total, total)
    top_logprobs, top_lists = (top_values.float() - total).tolist(), top_ids.tolist()
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=values[row],
            rank=ranks[row],
            top_token_ids=top_lists[row][: counts[row]],
            top_logprobs=top_logprobs[row][: counts[row]],
            given_logprobs=(logits[row, list(given[row])].float() - total[row]).tolist() if given[row] else [],
        )
        for row, token_id in enumerate(token_ids)
    ]


def _totals_and_ranks(logits: Tensor, chosen: Tensor) -> tuple[Tensor, list[int]]:
    """The log of the summed exponentials, float32 `[B, 1]`, and the chosen ids' ranks; on a CPU row by row, which a
    core's cache can hold."""
    num_parts = len(logits) if logits.device.type == "cpu" else 1
    totals, above = [], []
    for rows, values in zip(logits.chunk(num_parts), chosen.chunk(num_parts), strict=True):
        wide = rows.float()
        totals.append(wide.logsumexp(-1, keepdim=True))
        above.append((wide > values.float()).sum(-1))
    return torch.cat(totals), (torch.cat(above) + 1).tolist()
