"""transformers' Trainer with exact steps: its batches, loss and evaluation do not depend on how a step is cut.

The loss of a step is the sum over all its learned tokens, on all ranks, divided by their number. Knows no files and no
run folder.
"""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from trainer.examples.sequences import IGNORED, Example, ExampleSet
from trainer.steps.batches import BatchPlan, Layout, PlannedLoader
from trainer.steps.divergence import Place, StrictTrainer
from trainer.steps.loss import OutputLoss
from trainer.steps.neftune import EmbeddingNoise
from trainer.steps.packing import PACK_LENGTH, Batch, fill, pack, pad

GREATEST_EXPONENT = 700.0


class Units(torch.utils.data.Dataset[list[int]]):
    """What a batch is counted in: single examples, or in pre-training blocks of several; indices of `examples`."""

    def __init__(self, examples: ExampleSet, groups: list[list[int]]) -> None:
        self.examples = examples
        self.groups = groups
        lengths = examples.lengths
        self.lengths = [sum(lengths[index] for index in group) for group in groups]

    @classmethod
    def single(cls, examples: ExampleSet, indices: Iterable[int]) -> "Units":
        return cls(examples, [[index] for index in indices])

    @classmethod
    def blocks(cls, examples: ExampleSet, indices: Sequence[int], size: int) -> "Units":
        """Texts of at most `size` tokens in blocks of at most `size`."""
        lengths = examples.lengths
        filled = fill([lengths[index] for index in indices], size)
        return cls(examples, [[indices[number] for number in block] for block in filled])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[int]:
        return self.groups[index]


class ExactTrainer(StrictTrainer):
    """Trains `units`; `layout` says how a step is spread over forward passes."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        units: Units,
        layout: Layout,
        *,
        pad_id: int,
        validation: Units | None = None,
        neftune_alpha: float | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        self._plan = BatchPlan(units.lengths, layout, args.seed)
        args.gradient_accumulation_steps = self._plan.accumulation
        super().__init__(model=model, args=args, train_dataset=units, eval_dataset=validation, callbacks=callbacks)
        self._layout = layout
        self._pad_id = pad_id
        self._has_flash = str(model.config._attn_implementation or "").startswith("flash")
        self._output = OutputLoss(model)
        self._noise = EmbeddingNoise(model.get_input_embeddings(), neftune_alpha) if neftune_alpha else None
        self.loss_is_scaled_for_ga = True

    # ---- batches

    def get_train_dataloader(self) -> Any:
        return self._loader(self.train_dataset, self._plan)

    def _loader(self, units: Any, plan: BatchPlan) -> Any:
        return PlannedLoader(
            units,
            batch_sampler=plan,
            collate_fn=lambda members: self._collate(units.examples, members),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _collate(self, examples: ExampleSet, members: list[list[int]]) -> Batch:
        indices = [index for unit in members for index in unit]
        chosen = [examples[index] for index in indices] or [Example([self._pad_id] * 2, [IGNORED] * 2)]
        # Fused attention on a GPU takes long rows well, and flash attention knows packs in a single row only.
        longest = PACK_LENGTH * (4 if torch.cuda.is_available() else 1)
        if self._has_flash:
            longest = sum(len(example.token_ids) for example in chosen)
        batch = pack(chosen, self._pad_id, longest) if self._layout.max_tokens else pad(chosen, self._pad_id)
        return {**batch, "rows": torch.tensor(indices, dtype=torch.int64)}

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Learned tokens of the step, over all ranks."""
        count = sum(((batch["labels"] != IGNORED).sum() for batch in batch_samples), torch.tensor(0)).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        count = (inputs["sample_lengths"] > 0).sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum().item())

    # ---- loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This pass's share of the step's mean loss, times the number of ranks, whose gradients are averaged."""
        total = self._summed_loss(model, inputs)
        loss = total * (self.args.world_size / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _summed_loss(self, model: Any, inputs: Batch) -> Tensor:
        names = ("input_ids", "attention_mask", "position_ids")
        fed: dict[str, Any] = {name: inputs[name] for name in names if name in inputs}
        if "position_ids" in fed:
            fed["use_cache"] = False  # with a cache no isolating mask is built
        with ExitStack() as entered:
            entered.enter_context(self._output.learning(inputs["labels"]))
            if self._noise:
                entered.enter_context(self._noise.for_lengths(inputs["sample_lengths"]))
            outputs = model(**fed)
        total: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return total

    def _place(self, row: int) -> Place:
        example = self.train_dataset.examples[row]  # type: ignore[union-attr]
        return example.source, example.line

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss`: mean over all learned tokens of the validation set; `eval_perplexity`: its exponential."""
        began = time.perf_counter()
        units: Any = eval_dataset or self.eval_dataset
        layout = Layout(
            self.args.per_device_eval_batch_size,
            num_ranks=self._layout.num_ranks,
            rank=self._layout.rank,
            max_tokens=self._layout.max_tokens,
        )
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._loader(units, BatchPlan(units.lengths, layout)):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                sums[0] += self._summed_loss(model, inputs)
            sums[1] += (inputs["labels"] != IGNORED).sum()
        model.train(was_training)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss = float(sums[0] / sums[1].clamp(min=1))
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, GREATEST_EXPONENT)),
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - began, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
