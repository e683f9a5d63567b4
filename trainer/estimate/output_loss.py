"""The output layer and its loss: what the trainer's chunks take, and what whole logits would.

The trainer never has all logits (trainer.steps.loss): only places with a label, in chunks. Plain transformers and most
other tools keep them for every place, in the model's format and again in float32.
"""

from dataclasses import dataclass

from trainer.estimate.activations import Numbers, Pass
from trainer.estimate.shape import ModelShape
from trainer.estimate.trained import Trained
from trainer.steps.loss import CHUNK_BYTES, ROW_STEP

LAYERED_ROWS = 128  # of a chunk where the output layer is no plain matrix


@dataclass(frozen=True)
class LossBytes:
    """`kept`: until the backward pass ends. `passing`: while a chunk is computed. `whole`: all logits, elsewhere."""

    kept: int
    passing: int
    whole: int
    logits: int = 0  # of `passing`


def loss_bytes(shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers) -> LossBytes:
    """Of one forward pass in which every place has a label.

    Kept: the chosen hidden states, their gradient, and the output layer's gradient if it is trained. Passing: a chunk
    of float32 logits; in 16 bits also the matrix product and, of float32 weights, the matrix and its gradient's casts.
    """
    states = run.tokens * shape.hidden * numbers.compute
    head = shape.num_embedding * numbers.base if trained.trains_head else 0
    rows = min(run.tokens, chunk_rows(shape.vocabulary, on_cpu=numbers.on_cpu))
    logits = rows * shape.vocabulary * 4
    half = 2 * rows * shape.vocabulary * numbers.compute if numbers.compute < 4 else 0
    matrix = shape.num_embedding * numbers.compute if numbers.compute < numbers.base else 0
    # The output layer's gradient of a chunk, in 16 bits, in float32, and divided.
    casts = shape.num_embedding * (numbers.compute + 8) if trained.trains_head and matrix else 0
    return LossBytes(2 * states + head, logits + half // 2 + matrix + casts, whole_logits(shape, run, numbers), logits)


def chunk_rows(vocabulary: int, *, on_cpu: bool) -> int:
    """Rows of logits that the trainer computes at once."""
    size = CHUNK_BYTES["cpu" if on_cpu else "cuda"]
    return max(ROW_STEP, size // (4 * vocabulary) // ROW_STEP * ROW_STEP)


def whole_logits(shape: ModelShape, run: Pass, numbers: Numbers) -> int:
    """Logits of every place in float32, their gradient, and the same in the compute format where that has 16 bits."""
    count = run.tokens * shape.vocabulary
    return count * 8 + (count * 2 * numbers.compute if numbers.compute < 4 else 0)


TRL_TILE = (4096, 32768)  # tokens and vocabulary entries of TRL's tiles (trl.kernels.chunked_logprob)


def pair_loss_bytes(shape: ModelShape, trained: Trained, run: Pass, numbers: Numbers, *, is_reward: bool) -> LossBytes:
    """dpo scores every place of both answers in float32 tiles, of which the backward pass has four; rm has none."""
    if is_reward:
        return LossBytes(0, 0, 0)
    tile = min(run.tokens, TRL_TILE[0]) * min(shape.vocabulary, TRL_TILE[1]) * 4
    head = shape.num_embedding * 4 if trained.trains_head else 0
    return LossBytes(head + run.tokens * shape.hidden * 4, 4 * tile, whole_logits(shape, run, numbers), 4 * tile)


def ppo_loss_bytes(shape: ModelShape, run: Pass, numbers: Numbers, num_new: int) -> LossBytes:
    """ppo has the logits of every place, and log probabilities of the answer in float32 with their gradient."""
    every = run.tokens * shape.vocabulary * numbers.compute
    answers = run.rows * num_new * shape.vocabulary * 4
    return LossBytes(every + answers, every + 2 * answers, every + answers, 2 * every + 3 * answers)
