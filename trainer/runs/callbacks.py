"""What watches transformers' training loop: metrics, events, checkpoints sealed, the stop after a step.

`run_training` is the way in. The loop itself, the loss and the data are others' affair.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.methods.unsaved_weights import load_unsaved_weights, save_unsaved_weights
from trainer.ranks import any_rank, rank, wait_for_all
from trainer.runs.board import NAME, board_callback, check_board
from trainer.runs.checkpoints import is_sealed, rotate, seal
from trainer.runs.progress import ProgressBar, TokenMeter
from trainer.runs.session import Session

# What TrainingArguments must say for a run to be resumable and for its numbers to be true.
ARGUMENTS: Mapping[str, Any] = {
    "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting
    "save_total_limit": None,  # transformers would delete the last whole checkpoint before the next one is sealed
    "save_only_model": False,
    "enable_jit_checkpoint": False,  # it can save in the middle of an accumulation, whose random state is lost
    "include_num_input_tokens_seen": "non_padding",
    "logging_nan_inf_filter": False,  # it would show NaN as 0.0
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}
_NOISE = ("total_flos", "num_input_tokens_seen", "step")
_NOISE_ENDS = ("_runtime", "_per_second")  # of transformers: padding counts there


class AlreadyTrained(Exception):
    """The checkpoint was written after the last step."""


def run_callbacks(
    session: Session,
    *,
    title: str,
    save_total_limit: int | None = None,
    bar: bool = True,
    report_to: Sequence[str] = (),
) -> list[TrainerCallback]:
    """All that every run needs, in the order in which a Trainer must be given them.

    `bar`: a progress bar on stderr. Raises ConfigError when `report_to` names what is not installed.
    """
    check_board(report_to)
    meter = TokenMeter()
    callbacks: list[TrainerCallback] = [Recorder(session, meter), Keeper(session, save_total_limit)]
    if bar and rank() == 0:
        callbacks.append(ProgressBar(title, meter))
    if NAME in report_to and rank() == 0:
        callbacks.append(board_callback(session.run, session.start.step))
    return callbacks


def run_training(trainer: Trainer, session: Session) -> None:
    """Train from the session's start to the end. Raises Stopped when a signal ended it after a saved checkpoint."""
    checkpoint = session.start.checkpoint
    trainer.remove_callback(PrinterCallback)
    session.stop.is_training = True
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyTrained:
        if _best(trainer):
            trainer._load_best_model()
    finally:
        session.stop.is_training = False
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()
    # A signal that came after the last step found nothing left to stop: then the result is saved as usual.
    if any(isinstance(callback, Keeper) and callback.stopped for callback in trainer.callback_handler.callbacks):
        raise session.stop.error(_stop_text(session, trainer.state))
    if best := _best(trainer):
        load_unsaved_weights(trainer.model, Path(best))


def _best(trainer: Trainer) -> str | None:
    """The checkpoint that is the run's result, unless that is simply its last step."""
    return trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None


def _stop_text(session: Session, state: TrainerState) -> str:
    name = session.stop.requested.name if session.stop.requested else "another process"
    return (
        f"run {session.run.id} stopped by {name} at step {state.global_step} of {state.max_steps}; "
        f"checkpoint-{state.global_step} is saved, and the same command goes on from there"
    )


class Recorder(TrainerCallback):
    """metrics.jsonl and events.jsonl."""

    def __init__(self, session: Session, meter: TokenMeter) -> None:
        self._run = session.run
        self._meter = meter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._run.record(max_steps=state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._meter.begin(state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._meter.end(state.num_input_tokens_seen)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "train_loss" in logs:  # the summary of this process, not a point of a curve
            self._run.append_event("trained", step=state.global_step, seconds=round(logs["train_runtime"], 3))
            return
        line: dict[str, Any] = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        line |= {k: v for k, v in logs.items() if k not in _NOISE and not k.endswith(_NOISE_ENDS)}
        if "loss" in logs:
            line["tokens_per_second"] = round(self._meter.read(), 1)
        if "eval_perplexity" in line:  # where the evaluation loss is per token: pt and sft
            line["perplexity"] = line.pop("eval_perplexity")
        self._run.append_metrics(line)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        self._run.append_event("evaluated", step=state.global_step, eval_loss=(metrics or {}).get("eval_loss"))


class Keeper(TrainerCallback):
    """Seals each checkpoint, lets go of old ones, and stops the loop once a requested stop is saved."""

    def __init__(self, session: Session, save_total_limit: int | None) -> None:
        self._session = session
        self._limit = save_total_limit
        self._stopping = False
        self.stopped = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        if self._session.start.checkpoint is None:
            return
        load_unsaved_weights(model, self._session.start.checkpoint)
        if _is_finished(state):
            raise AlreadyTrained
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]  # transformers goes on with the checkpoint's intervals
        if self._session.start.changed:
            _apply_settings(args, optimizer, lr_scheduler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any_rank(self._session.stop.requested is not None, args.device) and not control.should_training_stop:
            self._stopping = control.should_save = True
        # The mean loss between two log lines is not part of a checkpoint, so the line is written with it.
        control.should_log |= control.should_save

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_sealed(self._folder(state)):
            control.should_save = False  # never write into a whole one
        control.should_log |= control.should_save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        wait_for_all()  # each process writes its random state
        if rank() == 0:
            folder = self._folder(state)
            save_unsaved_weights(model, folder)
            seal(folder, state.global_step, self._session.identity)
            best = state.best_model_checkpoint
            rotate(self._session.run.path, self._limit, [folder.parent / best] if best else [])
            self._session.run.append_event("checkpoint saved", step=state.global_step, checkpoint=folder.name)
        wait_for_all()
        if self._stopping:
            control.should_training_stop = self.stopped = True

    def _folder(self, state: TrainerState) -> Path:
        return self._session.run.path / f"checkpoint-{state.global_step}"


def _is_finished(state: TrainerState) -> bool:
    """Whether the checkpoint ends the run, by the last step or by early stopping; transformers would make one more."""
    saved: Any = state.stateful_callbacks  # a dict once it is read from a checkpoint
    return bool(saved.get("TrainerControl", {}).get("args", {}).get("should_training_stop"))


def _apply_settings(args: TrainingArguments, optimizer: Any, scheduler: Any) -> None:
    """The checkpoint brought its own learning rate and decay back; with resume_override the new ones count."""
    if optimizer is None or not hasattr(scheduler, "base_lrs"):
        return
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    for number, group in enumerate(optimizer.param_groups):
        group |= {key: value for key, value in settings.items() if key in group}
        if number == 0 or group["weight_decay"]:  # the Trainer's first group decays, its second never does
            group["weight_decay"] = args.weight_decay
    highest = max(scheduler.base_lrs)
    factor = args.learning_rate / highest if highest else 1.0
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["initial_lr"] = rate
        group["lr"] = group["lr"] * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
