"""dpo and rm: pairs of a better and a worse answer, trained by TRL on token ids that the server's renderer made.

Direct preference optimization: Rafailov et al. 2023, arXiv:2305.18290. TRL tokenizes and truncates nothing here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.data.rows import LedgerLine, Message, Row, RowRefused
from trainer.examples.base_facts import limits_of
from trainer.examples.dataset import load_data
from trainer.examples.labels import ToolRow, with_tools
from trainer.examples.truncate import Limits, fit, learned_runs
from trainer.methods.base_model import load_base
from trainer.options.arguments import loading, training_arguments
from trainer.options.checks import WHOLE_METHODS
from trainer.stages.evaluation import train_watched
from trainer.stages.text import callbacks
from trainer.steps.divergence import StrictTrainer

if TYPE_CHECKING:
    from trainer.train import Job


@dataclass(frozen=True)
class Pair:
    """One question with two answers, each ended by its stop token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: str
    line: int


@dataclass(frozen=True)
class PairLabels:
    """Both answers follow the same prompt, which is cut for the longer of them."""

    renderer: ChatRenderer
    limits: Limits

    def of(self, row: Row) -> Iterator[Pair | LedgerLine]:
        """The row's pair, or a line that says why there is none."""
        try:
            told = with_tools(row, self.renderer)
            pair, cuts = self._pair(told)
        except RowRefused as error:
            yield LedgerLine(row.source, row.line, "dropped", error.code, error.detail)
        except TextError as error:
            yield LedgerLine(row.source, row.line, "dropped", "bad-text", str(error))
        except TemplateError as error:
            yield LedgerLine(row.source, row.line, "dropped", "template", str(error))
        else:
            yield from told.notes
            if cuts:
                yield LedgerLine(row.source, row.line, "shortened", "too-long", "; ".join(cuts))
            yield pair

    def _pair(self, told: ToolRow) -> tuple[Pair, tuple[str, ...]]:
        row, tools = told.row, told.tools
        count = self.renderer.tokenizer.encode_plain
        longer = max((row.chosen, row.rejected), key=lambda text: len(count(text)))
        fitted = fit([*row.messages, _answer(longer)], self.renderer, self.limits, tools)
        if fitted.messages[-1]["content"] != longer:
            raise RowRefused("too-long", "an answer does not fit max_target_length; pairs are not cut")
        prompt = fitted.messages[:-1]
        chosen, rejected = (self._split(prompt, text, tools) for text in (row.chosen, row.rejected))
        if chosen[0] != rejected[0] or chosen[1] == rejected[1]:
            raise RowRefused("same-answers", "the two answers are the same tokens")
        return Pair(*chosen, rejected[1], row.source, row.line), fitted.cuts

    def _split(self, prompt: Sequence[Message], answer: str, tools: Any) -> tuple[list[int], list[int]]:
        text = self.renderer.render_training([*prompt, _answer(answer)], tools=tools)
        start, end = learned_runs(text.trained)[-1]
        return text.token_ids[:start], text.token_ids[start:end]


def train_preference(job: "Job") -> Any:
    """Raises DataError before the model is loaded, and whatever training raises."""
    config = job.config
    renderer = ChatRenderer.load(job.base)
    with job.ledger() as ledger:
        data = load_data(config, PairLabels(renderer, limits_of(config, job.base)).of, ledger)
    job.say(ledger.summary())
    job.run.record(
        num_examples=len(data.train),
        num_validation_examples=len(data.validation),
        num_replayed=data.num_replayed,
        num_rejected=ledger.rows["dropped"],
    )
    job.check_memory(pair_lengths(data.train))
    make = _reward_trainer if config.stage == "rm" else _dpo_trainer
    trainer = make(job, data.train, data.validation, callbacks(job, renderer))
    train_watched(job, trainer)
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")  # TRL's frozen copy
    return trainer


class _PairTrainer(StrictTrainer):
    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No: a run folder describes itself."""


class _Dpo(_PairTrainer, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # it is token ids already


class _Reward(_PairTrainer, RewardTrainer):
    pass


def _dpo_trainer(job: "Job", train: list[Pair], validation: list[Pair], watchers: list[Any]) -> Any:
    config = job.config
    # An adapter's reference is the base below it; whole weights need a second copy.
    is_whole = config.finetuning_type in WHOLE_METHODS
    trainer = _Dpo(
        job.load_model(),
        ref_model=load_base(job.base, **loading(config)) if is_whole else None,
        args=training_arguments(
            config,
            job.run.path,
            validates=bool(validation),
            kind=DPOConfig,
            beta=config.pref_beta,
            loss_type=[config.pref_loss],
            max_length=None,
        ),
        **_shared(job, train, validation, watchers),
    )
    return _with_rows(trainer, train)


def _reward_trainer(job: "Job", train: list[Pair], validation: list[Pair], watchers: list[Any]) -> Any:
    args = training_arguments(job.config, job.run.path, validates=bool(validation), kind=RewardConfig, max_length=None)
    return _with_rows(_Reward(job.load_model(), args=args, **_shared(job, train, validation, watchers)), train)


def _shared(job: "Job", train: list[Pair], validation: list[Pair], watchers: list[Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(
        job.base, local_files_only=True, trust_remote_code=job.config.trust_remote_code
    )
    is_reward = job.config.stage == "rm"
    return {
        "processing_class": tokenizer,
        "train_dataset": _dataset(train, is_reward),
        "eval_dataset": _dataset(validation, is_reward) if validation else None,
        "callbacks": watchers,
    }


def _with_rows(trainer: Any, train: list[Pair]) -> Any:
    """Batches that know their rows."""
    collate = trainer.data_collator

    def with_rows(members: list[dict[str, Any]]) -> Any:
        return {**collate(members), "rows": torch.tensor([member["row"] for member in members])}

    trainer.data_collator = with_rows
    trainer.places = [(pair.source, pair.line) for pair in train]
    return trainer


def _dataset(pairs: list[Pair], is_reward: bool) -> Any:
    """A reward model scores whole conversations, DPO answers."""
    rows = [
        {
            "row": row,
            "chosen_ids": pair.prompt_ids + pair.chosen_ids,
            "rejected_ids": pair.prompt_ids + pair.rejected_ids,
        }
        if is_reward
        else {
            "row": row,
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
        }
        for row, pair in enumerate(pairs)
    ]
    return Dataset.from_list(rows)


def pair_lengths(pairs: list[Pair]) -> list[int]:
    """Of each pair, the tokens of the prompt with the longer answer."""
    return [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}
