"""What a request may do to logits before the choice: bias, penalties, bans.

In transformers' order (`generation/utils.py`, `_get_logits_processor`), with OpenAI's two penalties behind the
repetition penalty as in vLLM. Only the cells concerned are touched; a stage that no row asks for costs nothing.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.backends.hf.history import TokenHistory

REMOVED = float("-inf")


def edit_logits(logits: Tensor, histories: Seq[TokenHistory]) -> None:
    """Change `logits` (float32 `[n, V]`, contiguous; beam search gives log-probabilities) in place."""
    cells = logits.view(-1)
    _add_bias(cells, histories)
    _penalise_repetition(cells, histories)
    _penalise_presence(cells, histories)
    _ban(cells, histories)


def _add_bias(cells: Tensor, histories: Seq[TokenHistory]) -> None:
    """OpenAI's logit_bias."""
    biases = [history.params.logit_bias for history in histories]
    if any(biases):
        index = _index(cells, len(histories), [(row, bias) for row, bias in enumerate(biases) if bias])
        values = [value for bias in biases for value in bias.values()]
        cells[index] += torch.tensor(values, device=cells.device)


def _penalise_repetition(cells: Tensor, histories: Seq[TokenHistory]) -> None:
    """CTRL (https://arxiv.org/abs/1909.05858), over prompt and output: divides what is above 0, multiplies the rest."""
    rows = [row for row, history in enumerate(histories) if history.params.repetition_penalty != 1.0]
    if rows:
        lists = [[*_both(histories[row])] for row in rows]
        index = _index(
            cells, len(histories), [(row, ids) for row, parts in zip(rows, lists, strict=True) for ids in parts]
        )
        lengths = [sum(map(len, parts)) for parts in lists]
        penalties = _spread([histories[row].params.repetition_penalty for row in rows], lengths, cells)
        found = cells[index]
        cells[index] = torch.where(found < 0, found * penalties, found / penalties)


def _penalise_presence(cells: Tensor, histories: Seq[TokenHistory]) -> None:
    """OpenAI's presence and frequency penalties, over the output only."""
    rows = [row for row, history in enumerate(histories) if history.has_count_penalty and history.num_output]
    if rows:
        some = [histories[row] for row in rows]
        index = _index(cells, len(histories), [(row, histories[row].output_ids) for row in rows])
        lengths = [len(history.output_ids) for history in some]
        counts = torch.cat([torch.frombuffer(history.output_counts, dtype=torch.int64) for history in some])
        presence = _spread([history.params.presence_penalty for history in some], lengths, cells)
        frequency = _spread([history.params.frequency_penalty for history in some], lengths, cells)
        cells[index] -= presence + frequency * counts.to(cells.device)


def _ban(cells: Tensor, histories: Seq[TokenHistory]) -> None:
    """Endings of n-grams that were there before, and stop ids before min_tokens."""
    banned = [(row, [*history.ngram_endings(), *history.banned_stops]) for row, history in enumerate(histories)]
    banned = [(row, ids) for row, ids in banned if ids]
    if banned:
        cells[_index(cells, len(histories), banned)] = REMOVED


def _both(history: TokenHistory) -> Iterable["array[int]"]:
    """Prompt and output ids. One in both comes twice: its cell is read once and written twice with the same value."""
    yield history.prompt_ids
    if history.num_output:
        yield history.output_ids


def _index(cells: Tensor, num_rows: int, ids_of_rows: Iterable[tuple[int, Iterable[int]]]) -> Tensor:
    """Places in the flattened logits of the given rows' ids, in the given order."""
    vocab_size = len(cells) // num_rows
    return torch.cat([_tensor(ids) + row * vocab_size for row, ids in ids_of_rows]).to(cells.device)


def _tensor(ids: Iterable[int]) -> Tensor:
    """Arrays without a copy: a view of them must not outlive the expression it stands in, or they cannot grow."""
    return torch.frombuffer(ids, dtype=torch.int64) if isinstance(ids, array) else torch.tensor(list(ids))


def _spread(values: Seq[float], lengths: Seq[int], like: Tensor) -> Tensor:
    """Each value as often as its length says."""
    return torch.tensor(values, dtype=like.dtype).repeat_interleave(torch.tensor(lengths)).to(like.device)
