"""Cross entropy over the tokens that are learned, a few rows at a time: full logits never exist.

With a vocabulary of 152k the logits of a batch are gigabytes, and in a chat most tokens are not learned at all. The
output layer is therefore fed only with the places that have a label, in chunks, and inside its own forward call, where
DDP, FSDP2 and ZeRO-3 expect its weights to be used. Knows nothing of data or steps.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.examples.sequences import IGNORED

CHUNK_BYTES = {"cpu": 80 << 20, "cuda": 512 << 20}  # of float32 logits
ROW_STEP = 64  # few shapes: CPU matrix kernels are compiled per shape
FP16_LIFT = 16.0  # keeps the small gradients of rare tokens above float16's least number


class OutputLoss:
    """Turns a model's output layer into its loss while `learning` is entered; else the layer works as ever."""

    def __init__(self, model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Module):
            raise TypeError(f"{type(model).__name__} has no output layer")
        self._forward = head.forward
        self._is_plain = type(head) is nn.Linear
        self._head = head
        self._labels: Tensor | None = None
        head.forward = self._loss_or_logits

    def remove(self) -> None:
        """The output layer as it was."""
        del self._head.forward

    @contextmanager
    def learning(self, labels: Tensor) -> Iterator[None]:
        """Inside, the model's `logits` are the sum (float32, no dimension) of the losses of `labels` [rows, length]."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def _loss_or_logits(self, hidden: Tensor) -> Tensor:
        if self._labels is None:
            logits: Tensor = self._forward(hidden)
            return logits
        labels, self._labels = self._labels, None
        # Prompt methods put virtual tokens before the text: the places count from the end.
        places, targets = learned_places(labels)
        rows = hidden[:, hidden.shape[1] - labels.shape[1] :].flatten(0, 1)[places]
        if self._is_plain:
            return linear_cross_entropy(rows, self._head.weight, self._head.bias, targets)  # type: ignore[arg-type]
        return _layered_cross_entropy(self._forward, rows, targets)


def learned_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels [rows, length]: flat positions whose next token is learned, and that token.

    Filled up to a round number with targets that the loss ignores; never empty, so that every rank has a loss.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    places = (targets != IGNORED).nonzero().squeeze(1)
    missing = max(ROW_STEP, math.ceil(len(places) / ROW_STEP) * ROW_STEP) - len(places)
    return F.pad(places, (0, missing)), F.pad(targets[places], (0, missing), value=IGNORED)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias`, in float32.

    hidden [n, width], weight [vocabulary, width], targets [n]; IGNORED counts nothing. Gradients are computed in the
    forward pass, where the logits are at hand; they hold for one backward pass, and not for second derivatives.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(hidden.dtype)
            grads = (
                torch.empty_like(hidden) if wants_hidden else None,
                torch.zeros_like(weight) if wants_weight else None,
                torch.zeros_like(bias) if wants_bias and bias is not None else None,
            )
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, len(targets), size := _chunk_rows(weight)):
                part = slice(start, start + size)
                total += _chunk(hidden[part], matrix, bias, targets[part], grads, part)
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.has = [grad is not None for grad in grads]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        # In place: a second copy of the output layer's gradient would be the memory peak of full training.
        found = [next(saved).mul_(grad_output) if has else None for has in ctx.has]
        return found[0], found[1], found[2], None


def _chunk(
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    part: slice,
) -> Tensor:
    """Loss of some rows; writes their gradients."""
    counts = targets != IGNORED
    column = targets.clamp(min=0).unsqueeze(1)
    logits = hidden @ matrix.t()
    logits = logits.float() if bias is None else logits.float() + bias.float()
    log_p = torch.log_softmax(logits, dim=-1, out=logits)  # each row is read before it is written
    loss = -(log_p.gather(1, column).squeeze(1) * counts).sum()
    if any(grad is not None for grad in grads):
        grad_logits = log_p.exp_()  # now the probabilities
        grad_logits.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad_logits.dtype))
        grad_logits.index_fill_(0, (~counts).nonzero().squeeze(1), 0.0)
        _write_gradients(hidden, matrix, grad_logits, grads, part)
    return loss


def _write_gradients(
    hidden: Tensor,
    matrix: Tensor,
    grad_logits: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    part: slice,
) -> None:
    grad_hidden, grad_weight, grad_bias = grads
    lift = FP16_LIFT if hidden.dtype == torch.float16 else 1.0
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0).to(grad_bias.dtype)
    factor = (grad_logits.mul_(lift) if lift != 1.0 else grad_logits).to(hidden.dtype)
    if grad_hidden is not None:
        grad_hidden[part] = (factor @ matrix) / lift if lift != 1.0 else factor @ matrix
    if grad_weight is not None and grad_weight.dtype == factor.dtype:
        grad_weight.addmm_(factor.t(), hidden, alpha=1.0 / lift)
    elif grad_weight is not None:
        grad_weight += (factor.t() @ hidden).to(grad_weight.dtype) / lift


def _layered_cross_entropy(layer: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same for any output layer (with LoRA, quantized): its logits are computed again in the backward pass."""

    def chunk(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(layer(rows).float(), wanted, ignore_index=IGNORED, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), 128):
        rows, wanted = hidden[start : start + 128], targets[start : start + 128]
        total = total + checkpoint(chunk, rows, wanted, use_reentrant=False)
    return total


def _chunk_rows(weight: Tensor) -> int:
    size = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"])
    return max(ROW_STEP, size // (4 * weight.shape[0]) // ROW_STEP * ROW_STEP)
