"""When the tasks of a run in training are asked: before the first step, with each evaluation, and (by `train`) last."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.ranks import first_decides, gathered, rank
from trainer.runs.callbacks import run_training

if TYPE_CHECKING:
    from trainer.evaluate.during import RunEvaluation
    from trainer.train import Job


def train_watched(job: "Job", trainer: Any) -> None:
    """`run_training`, with `eval_tasks` in it if there are any."""
    if job.evaluation is not None:
        trainer.add_callback(TaskEvaluations(job, trainer, job.evaluation))
    run_training(trainer, job.session)


class TaskEvaluations(TrainerCallback):
    """Every process takes part in writing the weights; the first one evaluates, and the others wait for it.

    Without validation data nothing else is evaluated, and `eval_strategy` and `eval_steps` are for the tasks alone.
    """

    def __init__(self, job: "Job", trainer: Any, evaluation: "RunEvaluation") -> None:
        self._job = job
        self._trainer = trainer
        self._evaluation = evaluation
        self._strategy = job.config.eval_strategy or "steps"
        self._last_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if rank() == 0:
            self._evaluation.forget_after(state.global_step)
        if state.global_step == 0:
            self._ask(state, is_first=True)
        self._last_step = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._ask(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        is_alone = args.eval_strategy == "no" and self._strategy == "steps"
        if is_alone and state.global_step % state.eval_steps == 0:
            self._ask(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.eval_strategy == "no" and self._strategy == "epoch":
            self._ask(state)

    def _ask(self, state: TrainerState, *, is_first: bool = False) -> None:
        step = state.global_step
        if step == self._last_step:
            return
        self._last_step = step
        state_dict = gathered(self._trainer)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the engine may need what training keeps for its next step
        ask = self._evaluation.prove if is_first else self._evaluation.measure
        first_decides(lambda: ask(step, lambda folder: self._job.write_weights(self._trainer, state_dict, folder)))
