"""What is found out about model and machine once, at start: does our way of computing give the model's own logits, and
how many prompt tokens does a step have time for.
"""

import logging
import time
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.backends.hf.batch import Batch, Part
from server.engine.backends.hf.kv_store import KvStore
from server.engine.backends.hf.network import Network
from server.engine.backends.hf.scheduler import Budget
from server.errors import ConfigError

log = logging.getLogger(__name__)

PROBE_TOKENS = 24
PIECES = (13, 10, 1)  # the probe is computed in these pieces, the last as decoding does
LEAST_CORRELATION = 0.98
LEAST_CORRELATION_INT8 = 0.9
IDLE_S = 0.5  # how long a step may take for prompts alone: leaving callers are noticed between steps
BUSY_S = 0.25  # and while others stream,
BUSY_RATIO = 2.4  # who notice a step that takes so many times as long as one without a prompt; see Budget.crowd
DECODE_TOKENS = 8
FAR_START, FAR_TOKENS, LEAST_FAR = 2048, 64, 256
SMALLEST_BUDGET = 16


def probe_ids(vocab_size: int) -> list[int]:
    """The same few different ids at every start."""
    return [(7 + 7919 * place) % vocab_size for place in range(PROBE_TOKENS)]


def reference_logits(model: PreTrainedModel) -> Tensor:
    """The model's own answer, float32 `[PROBE_TOKENS, V]`."""
    ids = torch.tensor([probe_ids(model.config.vocab_size)], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def check_network(network: Network, store: KvStore, expected: Tensor, row: int, is_int8: bool) -> None:
    """Compute the probe piece by piece. Raises ConfigError when that is not what the model computes."""
    ids = probe_ids(expected.shape[1])
    found, start = [], 0
    for count in PIECES:
        part = Part(row, start, ids[start : start + count], wants_all=True)
        found.append(network.forward(Batch([part], store)).float())
        start += count
    store.trim(row, 0, store.shape.round_up(start))
    least = _least_correlation(torch.cat(found), expected)
    log.info("computed like the model's own code: correlation of the logits %.5f", least)
    if not least >= (LEAST_CORRELATION_INT8 if is_int8 else LEAST_CORRELATION):
        raise ConfigError(
            f"The hf backend does not compute this model as its own code does (correlation of the logits {least:.3f}). "
            "Try QLOOP_HF_DTYPE=bf16, QLOOP_HF_FORWARD=generic if that is not set, or serve it with vllm."
        )


def probe_logits(network: Network, store: KvStore, part: Part, cells: Tensor | None) -> Tensor:
    """Logits after every token of `part`, float32 `[tokens, V]`; `cells` of virtual tokens come before them."""
    start = 0 if cells is None else cells.shape[2]
    if cells is not None:
        store.put(part.row, cells)
    token_ids = part.token_ids[: max(store.capacity - start, 1)]
    logits = network.forward(Batch([replace(part, start=start, token_ids=token_ids, wants_all=True)], store))
    store.trim(part.row, 0, store.shape.round_up(start + len(token_ids)))
    return logits.float()


def _least_correlation(found: Tensor, expected: Tensor) -> float:
    """Over positions; NaN if a logit is not a number."""
    left, right = (logits - logits.mean(-1, keepdim=True) for logits in (found, expected))
    return float(torch.cosine_similarity(left, right, dim=-1).amin())


def measured_budget(network: Network, store: KvStore, row: int, most: int, max_len: int) -> Budget:
    """What a step has time for, in powers of two, at most `most`; the model has `max_len` positions.

    Measured once: budgets that followed the clock would change rounding from run to run, and with it texts.
    """
    decode = _seconds(network, store, row, DECODE_TOKENS)
    idle = crowd = busy = count = min(SMALLEST_BUDGET, most)
    while count <= min(most, max_len // 2):
        seconds = _seconds(network, store, row, count)
        if seconds > IDLE_S:
            break
        idle = count
        crowd = count if seconds <= BUSY_S else crowd
        busy = count if seconds <= min(BUSY_RATIO * decode, BUSY_S) else busy
        count *= 2
    store.trim(row, 0, store.capacity)
    return Budget(idle, crowd, busy, _far(network, store, row, decode, max_len))


def _far(network: Network, store: KvStore, row: int, decode: float, max_len: int) -> int:
    """After how many cells attention costs a prompt's token as much as all the rest."""
    start = min(FAR_START, max_len - FAR_TOKENS)
    if start < FAR_TOKENS:
        return store.capacity
    near, far = (_seconds(network, store, row, FAR_TOKENS, place) for place in (0, start))
    store.trim(row, 0, store.capacity)
    ratio = max(near - decode, 0.1 * near) / max(far - near, 0.01 * near)
    return max(int(start * ratio), LEAST_FAR)


def _seconds(network: Network, store: KvStore, row: int, count: int, start: int = 0) -> float:
    """The best of three passes over `count` tokens behind `start` cells; the first of a shape also compiles kernels."""
    batch = Batch([Part(row, start, [0] * count)], store)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        network.forward(batch)[0, 0].item()
        times.append(time.perf_counter() - begin)
        if times[-1] > IDLE_S:
            break  # a large model on a small machine should not start longer for this
    return min(times)
