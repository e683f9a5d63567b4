"""From logits to token ids, one row per sequence, each with its own parameters.

After the edits of `logit_edits` a greedy row takes its largest value; the others are divided by the temperature, cut
by top_k, top_p and min_p in this order, and drawn from by inverse CDF: as transformers' warpers define it, without
sorting a vocabulary. On a CPU every row is worked on by itself: it stays in the core's cache, and its batch mates
cannot change even its rounding. Values are float32, sums float64. Knows nothing about the model or the KV store.
"""

from collections.abc import Sequence as Seq

import torch
from msgspec.structs import replace
from torch import Tensor

from server.engine.backends.hf.chunks import CHUNK, chunk_peaks, first_best, in_chunks
from server.engine.backends.hf.logit_edits import REMOVED, edit_logits
from server.engine.backends.hf.sequence import Sequence
from server.engine.messages import SamplingParams

BINS, BINS_PER_NAT = 4096, 128  # 32 nats below the likeliest id; what is still less likely shares the last bin
SLACK = 1e-3  # nats by which the first, coarse bounds stay below the exact ones
LOWEST = torch.finfo(torch.float32).min


def choose(logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
    """One id per row of `logits` (`[B, V]`, any float type; left as they are); None where there is nothing to choose:
    the logits are not numbers, or all of them are banned."""
    peaks = chunk_peaks(logits)
    chosen = _best(logits, peaks)
    busy = [
        row
        for row, sequence in enumerate(sequences)
        if chosen[row] is not None and (sequence.history.edits_logits or not sequence.is_greedy)
    ]
    for rows in _groups(busy, logits):
        ids = _choose_busy(_own(logits, rows), peaks[rows], [sequences[row] for row in rows])
        for row, token_id in zip(rows, ids, strict=True):
            chosen[row] = token_id
    return chosen


def sample(logits: Tensor, peaks: Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> list[int]:
    """Draw one id per row of `logits` (finite float32 `[n, V]` with their chunk peaks; overwritten) at the point of its
    distribution that its number in [0, 1) names, ids in ascending order."""
    vocab_size = logits.shape[-1]
    params = [p if p.top_k < vocab_size else replace(p, top_k=0) for p in params]
    temperatures = _column([p.temperature for p in params], logits)
    logits, peaks = logits.div_(temperatures), peaks / temperatures
    ids = [0] * len(params)
    for is_cut, draw in ((True, _draw_cut), (False, _draw_whole)):
        rows = [row for row, p in enumerate(params) if _is_cut(p) == is_cut]
        if rows:
            part, part_peaks = (logits, peaks) if len(rows) == len(params) else (logits[rows], peaks[rows])
            drawn = draw(part, part_peaks, [params[row] for row in rows], [uniforms[row] for row in rows])
            for row, token_id in zip(rows, drawn, strict=True):
                ids[row] = token_id
    return ids


def _groups(rows: list[int], logits: Tensor) -> list[list[int]]:
    if logits.device.type == "cpu":
        return [[row] for row in rows]
    return [rows] if rows else []


def _own(logits: Tensor, rows: list[int]) -> Tensor:
    """A float32 copy of some rows; of one row without gathering first."""
    part = logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
    return part.to(torch.float32, copy=True)


def _best(logits: Tensor, peaks: Tensor) -> list[int | None]:
    is_sound = peaks.amax(-1).isfinite().tolist()
    return [id_ if ok else None for id_, ok in zip(first_best(logits, peaks).tolist(), is_sound, strict=True)]


def _choose_busy(logits: Tensor, peaks: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
    """Rows that are edited or sampled; `logits` is their own copy."""
    if any(sequence.history.edits_logits for sequence in sequences):
        edit_logits(logits, [sequence.history for sequence in sequences])
        peaks = chunk_peaks(logits)
    chosen = _best(logits, peaks)
    sampled = [row for row, sequence in enumerate(sequences) if chosen[row] is not None and not sequence.is_greedy]
    if sampled:
        part, part_peaks = (logits, peaks) if len(sampled) == len(sequences) else (logits[sampled], peaks[sampled])
        some = [sequences[row] for row in sampled]
        drawn = sample(part, part_peaks, [one.params for one in some], [one.uniform() for one in some])
        for row, token_id in zip(sampled, drawn, strict=True):
            chosen[row] = token_id
    return chosen


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _draw_whole(logits: Tensor, peaks: Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> list[int]:
    """First the chunk, then the id inside it."""
    weights = in_chunks(logits.sub_(peaks.amax(-1, keepdim=True)).exp_(), filler=0.0)
    cumulative = weights.sum(-1, dtype=torch.float64).cumsum(-1)
    points = _column(uniforms, cumulative) * cumulative[:, -1:]
    chunks = _first_beyond(cumulative, points)
    before = cumulative.gather(-1, (chunks - 1).clamp(min=0)).masked_fill_(chunks == 0, 0.0)
    inside = weights.gather(1, chunks[:, :, None].expand(-1, -1, CHUNK))[:, 0].double().cumsum(-1)
    ids: list[int] = (chunks * CHUNK + _first_beyond(inside, points - before))[:, 0].tolist()
    return ids


def _draw_cut(logits: Tensor, peaks: Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> list[int]:
    """A coarse bound leaves few candidates; the exact cuts are made among those."""
    top = peaks.amax(-1, keepdim=True)
    mass = _mass(logits, top, params)
    values, ids = _candidates(logits, peaks, _floors(logits, peaks, top, mass, params))
    cumulative = _kept_weights(values, top, mass, params).cumsum(-1)
    points = _column(uniforms, cumulative) * cumulative[:, -1:]
    drawn: list[int] = ids.gather(-1, _first_beyond(cumulative, points))[:, 0].tolist()
    return drawn


def _mass(logits: Tensor, top: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """float64 `[n, 1]`: what top_p is a share of, in units of the likeliest id. 1 where nothing or top_k decides."""
    if all(p.top_p >= 1.0 or p.top_k > 0 for p in params):
        return torch.ones_like(top, dtype=torch.float64)
    return (logits - top).exp_().sum(-1, keepdim=True, dtype=torch.float64)


def _floors(logits: Tensor, peaks: Tensor, top: Tensor, mass: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """`[n, 1]`: no id below this can survive.

    top_k: k chunks have peaks at or above the k-th largest peak. top_p: ids of less than (1 - top_p) / V of the mass
    are less than 1 - top_p even all together. min_p: as it stands. Of what top_k leaves, top_p must see all: then
    top_k's bound goes alone.
    """
    vocab_size = logits.shape[-1]
    floors = torch.full_like(top, LOWEST)
    counts = [p.top_k for p in params]
    if any(counts):
        places = torch.tensor([max(k - 1, 0) for k in counts], device=peaks.device)[:, None]
        searched = peaks if max(counts) <= peaks.shape[-1] else logits
        kth = searched.topk(max(counts)).values.gather(-1, places)
        floors = torch.where(_column(counts, top) > 0, kth, floors)
    shares = [1.0 if p.top_p >= 1.0 or p.top_k > 0 else (1.0 - p.top_p) / vocab_size for p in params]
    if min(shares) < 1.0:
        bound = (top + mass.log() + _column(shares, mass).log()).float() - SLACK
        floors = torch.where(_column(shares, top) < 1.0, torch.maximum(floors, bound), floors)
    least = [p.min_p if p.top_p >= 1.0 or p.top_k == 0 else 0.0 for p in params]
    if any(least):
        bound = top + _column(least, top).log() - SLACK  # log(0) bounds nothing
        floors = torch.maximum(floors, bound)
    return floors


def _candidates(logits: Tensor, peaks: Tensor, floors: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of all at or above the floor, `[n, most]` each, ids ascending; filled up with REMOVED and 0."""
    rows, chunks = (peaks >= floors).nonzero(as_tuple=True)
    blocks = in_chunks(logits)[rows, chunks]
    which, offsets = (blocks >= floors[rows]).nonzero(as_tuple=True)
    owners = rows[which]
    places = _places(owners, len(logits))
    values = logits.new_full((len(logits), int(places.max()) + 1), REMOVED)
    values[owners, places] = blocks[which, offsets]
    ids = torch.zeros_like(values, dtype=torch.int64)
    ids[owners, places] = chunks[which] * CHUNK + offsets
    return values, ids


def _kept_weights(values: Tensor, top: Tensor, mass: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Probabilities in units of the likeliest id, float64; 0 for what top_k, top_p or min_p removes."""
    if any(p.top_k > 0 for p in params):
        values = _top_k(values, params)
    weights = (values - top).double().exp_()
    if any(p.top_p < 1.0 for p in params):
        mass = torch.where(_column([p.top_k for p in params], values) > 0, weights.sum(-1, keepdim=True), mass)
        weights = weights.masked_fill(~_in_nucleus(values, weights, top, mass, params), 0.0)
    if any(p.min_p > 0.0 for p in params):  # https://arxiv.org/abs/2407.01082
        weights = weights.masked_fill(weights < _column([p.min_p for p in params], weights), 0.0)
    return weights


def _top_k(values: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Keep the k largest and those that tie with the last of them. 0 keeps all."""
    wanted = [min(p.top_k or values.shape[-1], values.shape[-1]) for p in params]
    places = torch.tensor([k - 1 for k in wanted], device=values.device)[:, None]
    return values.masked_fill(values < values.topk(max(wanted)).values.gather(-1, places), REMOVED)


def _in_nucleus(values: Tensor, weights: Tensor, top: Tensor, mass: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """The fewest most likely ids that together reach top_p, https://arxiv.org/abs/1904.09751. Of ids that tie with the
    last one in, the lowest stay (transformers leaves that to its sort)."""
    shares = _column([p.top_p for p in params], mass)
    unsure, reached = values, torch.zeros_like(mass)
    if values.shape[-1] > BINS:
        unsure, reached = _edge_of_nucleus(values, weights, top, shares * mass)
    ordered = unsure.sort(-1, descending=True).values
    sums = reached + (ordered - top).double().exp_().cumsum(-1)
    counts = (sums < shares * mass).sum(-1, keepdim=True) + 1
    counts = torch.minimum(counts, (ordered > REMOVED).sum(-1, keepdim=True)).clamp(min=1)
    last = ordered.gather(-1, counts - 1)
    ties = values == last
    num_ties = counts - (ordered > last).sum(-1, keepdim=True)
    return (values > last) | (ties & (ties.cumsum(-1) <= num_ties)) | (shares >= 1.0)


def _edge_of_nucleus(values: Tensor, weights: Tensor, top: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Instead of sorting many values, a histogram: the values of the bin in which the sum reaches what is wanted
    (`[n, most]`), and the sum of all larger ones (`[n, 1]`)."""
    bins = ((top - values) * BINS_PER_NAT).clamp_(max=BINS - 1).long()  # a larger value never has a larger bin
    offsets = torch.arange(len(values), device=values.device)[:, None] * BINS
    sums = (bins + offsets).view(-1).bincount(weights.view(-1), BINS * len(values)).view(-1, BINS).cumsum(-1)
    edges = (sums < wanted).sum(-1, keepdim=True).clamp(max=BINS - 1)
    reached = sums.gather(-1, (edges - 1).clamp(min=0)).masked_fill(edges == 0, 0.0)
    return _compacted(values, bins == edges), reached


def _compacted(values: Tensor, mask: Tensor) -> Tensor:
    """What the mask keeps of each row, `[n, most]`, filled up with REMOVED."""
    owners, places = mask.nonzero(as_tuple=True)
    result = values.new_full((len(values), max(1, int(mask.sum(-1).max()))), REMOVED)
    result[owners, _places(owners, len(values))] = values[owners, places]
    return result


def _places(owners: Tensor, num_rows: int) -> Tensor:
    """0, 1, 2, … within each run of equal owners (ascending)."""
    counts = owners.bincount(minlength=num_rows)
    return torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]


def _first_beyond(cumulative: Tensor, points: Tensor) -> Tensor:
    """The first place of each row at which the sum passes the row's point; rounding cannot push it past the end."""
    total = cumulative[:, -1:]
    return torch.searchsorted(cumulative, torch.minimum(points, total.nextafter(torch.zeros_like(total))), right=True)


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
