"""From logits to token ids, one row per sequence, each with its own parameters.

Order: logit_bias, min_tokens, repetition, presence and frequency penalty; then, for rows that sample, temperature,
top_k, top_p, min_p. All in float32; the draw itself sums in float64. A stage that no row asks for costs nothing, so a
batch of plain greedy rows is one `max`. Knows nothing about the model or the KV store.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import SamplingParams

REMOVED = float("-inf")


def choose(logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
    """One id per row of `logits` (`[B, V]`, any float type); None where the logits are not numbers."""
    logits = logits.float()
    is_sound = logits.amax(-1).isfinite()
    logits = penalise(logits, sequences)
    best_logits, best = logits.max(-1)
    is_sound &= best_logits.isfinite()
    sound: list[bool] = is_sound.tolist()
    ids: list[int] = best.tolist()
    sampled = [row for row, sequence in enumerate(sequences) if sound[row] and not sequence.is_greedy]
    if sampled:
        warped = warp(logits[sampled], [sequences[row].params for row in sampled])
        drawn = draw(warped, [sequences[row].uniform() for row in sampled])
        for row, token_id in zip(sampled, drawn, strict=True):
            ids[row] = token_id
    return [token_id if ok else None for token_id, ok in zip(ids, sound, strict=True)]


def penalise(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Bias, banned stop ids and penalties; `logits` (float32 `[B, V]`) itself is left alone."""
    if any(sequence.edits_logits for sequence in sequences):
        logits = logits.clone()
        for stage in (_add_bias, _ban_stops, _penalise_repetition, _penalise_presence):
            stage(logits, sequences)
    return logits


def warp(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Temperature and the three ways of cutting off unlikely ids, as transformers' warpers define them."""
    logits = logits / _like([p.temperature for p in params], logits)[:, None]
    return _min_p(_top_p(_top_k(logits, params), params), params)


def draw(logits: Tensor, uniforms: Seq[float]) -> list[int]:
    """Inverse CDF: the first id at which the summed probability passes the row's number in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    ids: list[int] = torch.searchsorted(cumulative, torch.minimum(points, below_total), right=True)[:, 0].tolist()
    return ids


def _add_bias(logits: Tensor, sequences: Seq[Sequence]) -> None:
    """OpenAI's logit_bias: added to the raw logits."""
    cells = [(row, *item) for row, sequence in enumerate(sequences) for item in sequence.params.logit_bias.items()]
    if cells:
        rows, ids, values = zip(*cells, strict=True)
        index = (torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device))
        logits.index_put_(index, _like(values, logits), accumulate=True)


def _ban_stops(logits: Tensor, sequences: Seq[Sequence]) -> None:
    cells = [(row, token_id) for row, sequence in enumerate(sequences) for token_id in sequence.banned_ids]
    if cells:
        rows, ids = zip(*cells, strict=True)
        logits[torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device)] = REMOVED


def _penalise_repetition(logits: Tensor, sequences: Seq[Sequence]) -> None:
    """CTRL (https://arxiv.org/abs/1909.05858), over prompt and output: divides what is above 0, multiplies the rest."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.repetition_penalty != 1.0]
    if rows:
        row_index = torch.tensor(rows, device=logits.device)[:, None]
        ids = _padded([sequences[row].penalised_ids() for row in rows], logits.device)
        factors = _like([sequences[row].params.repetition_penalty for row in rows], logits)[:, None]
        found = logits[row_index, ids]
        logits[row_index, ids] = torch.where(found < 0, found * factors, found / factors)


def _penalise_presence(logits: Tensor, sequences: Seq[Sequence]) -> None:
    """OpenAI's presence and frequency penalties, over the output only."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.counts and sequence.has_count_penalty]
    if rows:
        row_index = torch.tensor(rows, device=logits.device)[:, None]
        ids = _padded([list(sequences[row].counts) for row in rows], logits.device)
        counts = _padded([list(sequences[row].counts.values()) for row in rows], logits.device)
        presence = _like([sequences[row].params.presence_penalty for row in rows], logits)[:, None]
        frequency = _like([sequences[row].params.frequency_penalty for row in rows], logits)[:, None]
        logits[row_index, ids] = logits[row_index, ids] - presence - frequency * counts


def _top_k(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Keep the k most likely ids, and those that tie with the last of them. 0 keeps all."""
    size = logits.shape[-1]
    wanted = [min(p.top_k, size) if p.top_k > 0 else size for p in params]
    rows = [row for row, k in enumerate(wanted) if k < size]
    if not rows:
        return logits
    part = logits[rows]
    values = part.topk(max(wanted[row] for row in rows)).values
    last = torch.tensor([wanted[row] - 1 for row in rows], device=logits.device)[:, None]
    logits[rows] = part.masked_fill(part < values.gather(-1, last), REMOVED)
    return logits


def _top_p(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Nucleus sampling, https://arxiv.org/abs/1904.09751: the fewest most likely ids that together reach top_p."""
    rows = [row for row, p in enumerate(params) if p.top_p < 1.0]
    if not rows:
        return logits
    part = logits[rows]
    ordered, order = part.sort(-1)
    unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - _like([params[row].top_p for row in rows], logits)[:, None]
    unlikely[:, -1] = False
    logits[rows] = part.masked_fill(unlikely.scatter(-1, order, unlikely), REMOVED)
    return logits


def _min_p(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Remove ids less likely than min_p times the most likely one, https://arxiv.org/abs/2407.01082."""
    rows = [row for row, p in enumerate(params) if p.min_p > 0.0]
    if not rows:
        return logits
    part = logits[rows]
    floor = part.amax(-1, keepdim=True) + _like([params[row].min_p for row in rows], logits).log()[:, None]
    logits[rows] = part.masked_fill(part < floor, REMOVED)
    return logits


def _padded(lists: Seq[list[int]], device: torch.device) -> Tensor:
    """`[B, longest]`, each row filled up with its own first element: writing the same value twice is harmless."""
    longest = max(map(len, lists))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in lists], device=device)


def _like(values: Seq[float], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=logits.dtype, device=logits.device)
