"""The largest forward pass that a run will make, from its real rows or, without them, from max_length.

Uses the trainer's own plan of batches, so packing, grouping by length and rounding are those of the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.data.rows import LedgerLine, Row
from trainer.estimate.activations import Pass
from trainer.examples.base_facts import limits_of
from trainer.examples.dataset import load_data
from trainer.examples.labels import label, labels_of
from trainer.examples.sequences import Example
from trainer.ledger import Ledger
from trainer.options.checks import PAIR_STAGES, PROMPT_METHODS
from trainer.steps.batches import BatchPlan, Layout
from trainer.steps.packing import PACK_LENGTH, balance_under, fill, rounded

EPOCHS = 2  # of the plan that are looked at


@dataclass(frozen=True)
class Rows:
    """`lengths` in tokens, in the run's own order; pairs count the longer answer. Empty: not known."""

    lengths: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


def read_lengths(config: TrainConfig, base: Path) -> Rows:
    """Tokens of every training row, labelled as training would. Raises DataError as training would."""
    renderer = ChatRenderer.load(base)
    with Ledger(None) as ledger:
        if config.stage in ("dpo", "rm"):
            from trainer.stages.preference import PairLabels, pair_lengths

            pairs = load_data(config, PairLabels(renderer, limits_of(config, base)).of, ledger).train
            return Rows(tuple(pair_lengths(pairs)))
        if config.stage == "ppo":
            return Rows()
        labels = labels_of(config, base, renderer)

        def length(row: Row) -> Iterator[int | LedgerLine]:
            for item in label(row, labels):
                yield len(item.token_ids) if isinstance(item, Example) else item

        return Rows(tuple(load_data(config, length, ledger).train))


def largest_pass(config: TrainConfig, rows: Rows, *, most: int, num_ranks: int = 1, on_cpu: bool = True) -> Pass:
    """`most`: tokens of the longest row that may come, where no rows are known."""
    size = config.per_device_train_batch_size
    if config.stage in PAIR_STAGES:
        count = 1 if config.stage == "ppo" else 2  # both answers go through together
        return Pass(count * size, min(rows.longest or most, most), is_packed=False)
    packs = config.packing is not False and config.finetuning_type not in PROMPT_METHODS
    if not rows.lengths:
        return _assumed(size, most, packs, on_cpu)
    lengths = _blocks(rows.lengths, config, most) if packs else list(rows.lengths)
    layout = Layout(size, config.gradient_accumulation_steps, num_ranks, 0, size * config.max_length if packs else None)
    plan = BatchPlan(lengths, layout, config.seed)
    extra = config.pre_seq_len if config.finetuning_type in ("prompt", "p_tuning") else 0
    found = (
        _pass([lengths[number] for number in members], packs, on_cpu)
        for epoch in range(EPOCHS)
        for window in plan.windows(epoch)
        for members in plan.mine(window)
        if members
    )
    widest = max(found, key=lambda one: one.tokens * 4096 + one.rows * one.width * one.width)
    return Pass(widest.rows, widest.width + extra, packs)


def _assumed(size: int, most: int, packs: bool, on_cpu: bool) -> Pass:
    """Every row as long as it may be."""
    longest = PACK_LENGTH * (1 if on_cpu else 4)
    together = max(1, longest // most) if packs else 1
    rows = -(-size // together)
    return Pass(rows, rounded(min(most * together, most * size)), packs)


def _blocks(lengths: Sequence[int], config: TrainConfig, most: int) -> list[int]:
    if config.stage != "pt":
        return list(lengths)
    return [sum(lengths[n] for n in block) for block in fill(lengths, max(most, *lengths))]


def _pass(lengths: Sequence[int], packs: bool, on_cpu: bool) -> Pass:
    if not packs:
        return Pass(len(lengths), rounded(max(lengths)), is_packed=False)
    rows = balance_under(lengths, PACK_LENGTH * (1 if on_cpu else 4))
    width = rounded(max(sum(lengths[n] for n in row) for row in rows))
    return Pass(len(rows), width)
