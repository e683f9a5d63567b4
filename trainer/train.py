"""One training run, from config to a saved model or adapter in its run folder.

Reading order: `train` -> `_run` -> a module of `trainer.stages` -> `Job.write_weights`. The loop is transformers'
Trainer; `trainer.steps.loop` makes its steps exact, `trainer.runs.session` gives the run its folder and its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed
from transformers.utils import logging

from server.store.hashes import weights_hash
from server.store.home import Home
from server.store.model_folder import read_model_config, resolve_model
from server.text.identity import text_identity
from trainer.config import TrainConfig
from trainer.errors import does_not_fit, is_memory_fault
from trainer.estimate.gate import check_fits
from trainer.examples.dataset import dataset_hash
from trainer.ledger import Ledger
from trainer.machine import return_freed_memory
from trainer.methods.apply import apply_method, describe
from trainer.methods.base_model import load_base, load_blank
from trainer.methods.faults import check_method
from trainer.options.arguments import attention_of, load_dtype, loading
from trainer.options.checks import WHOLE_METHODS
from trainer.ranks import first_decides, gathered, rank, wait_for_all
from trainer.results.card import make_card
from trainer.results.save import save_adapter, save_model
from trainer.runs.resume import HASHES, run_identity
from trainer.runs.run_folder import RunFolder
from trainer.runs.session import Session, run_session, say

if TYPE_CHECKING:
    from trainer.evaluate.during import RunEvaluation, TaskPlan

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Job:
    """What every stage needs to train."""

    config: TrainConfig
    base: Path
    home: Home
    session: Session
    title: str
    evaluation: "RunEvaluation | None" = None

    @property
    def run(self) -> RunFolder:
        return self.session.run

    def check_memory(self, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of the rows. Raises DoesNotFit; to be called before anything is loaded."""
        check_fits(self.config, self.base, lengths, home=self.home)

    def load_model(self) -> Any:
        """The base with the method applied. Raises ConfigError."""
        config = self.config
        if config.from_scratch:
            model = load_blank(
                self.base,
                dtype=load_dtype(config),
                attention=attention_of(config),
                trust_remote_code=config.trust_remote_code,
            )
        elif config.stage == "rm":
            model = load_base(self.base, **loading(config), auto_class=AutoModelForSequenceClassification, num_labels=1)
        else:
            model = load_base(self.base, **loading(config))
        model = apply_method(model, config)
        size = describe(model)
        self.run.record(num_trained_parameters=size.num_trained, num_base_parameters=size.num_base)
        self.say(str(size))
        return model

    def write_weights(self, trainer: Any, state: Any, folder: Path) -> None:
        """What is trained, as `adapter` or `model` in `folder`; `state` is what `gathered` gave."""
        config = self.config
        model = trainer.accelerator.unwrap_model(trainer.model)
        if config.finetuning_type in WHOLE_METHODS:
            save_model(model, self.base, folder / "model", state_dict=state)
            return
        name, record = base_name(config), {**self.session.identity, "id": self.run.id, "config": _options(config)}
        save_adapter(
            model,
            name,
            folder / "adapter",
            card=lambda adapter: make_card(adapter, self.base, name, record, self.home.hash_cache),
            state_dict=state,
        )

    def ledger(self) -> Ledger:
        return Ledger(self.run.path / REJECTS if rank() == 0 else None)

    def say(self, text: str) -> None:
        if rank() == 0:
            say(f"{self.title}: {text}")


def train(config: TrainConfig, home: Home, *, title: str | None = None) -> RunFolder:
    """Run to the end, or go on with a run that was stopped; run.json says which.

    Raises ConfigError, DataError, DriftError, Diverged, DoesNotFit and Stopped; see trainer.errors.
    """
    return_freed_memory()
    # A run shows one bar of its own.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base = resolve_model(config.model_name_or_path, home)
    model_config = read_model_config(base)
    notes = check_method(config, model_config)
    plan = _plan_tasks(config, model_config)
    processes = join_processes(config)  # before they agree on the run's folder
    identity = run_identity(
        config,
        dataset_hash=dataset_hash(config),
        base_weights_hash="" if config.from_scratch else weights_hash(base, cache_path=home.hash_cache),
        text=text_identity(base),
        num_processes=processes.num_processes,
    )
    with run_session(config, home.runs, identity) as session:
        job = Job(config, base, home, session, title or config.stage)
        if plan is not None:
            job = replace(job, evaluation=_evaluation(job, plan))
        for note in notes:
            job.say(note)
        try:
            _run(job)
        except Exception as error:
            if is_memory_fault(error):
                raise does_not_fit(error) from error
            raise
    return session.run


def join_processes(config: TrainConfig) -> PartialState:
    """The other processes of the run, if there are any. How long one waits for another is settled here: whoever comes
    later, as TrainingArguments does, finds the process group made and its own `ddp_timeout` unheard."""
    timeout_s = config.hf_arguments.get("ddp_timeout", TrainingArguments.ddp_timeout)
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout_s))


def _plan_tasks(config: TrainConfig, model_config: Mapping[str, Any]) -> "TaskPlan | None":
    if not config.eval_tasks:
        return None
    from trainer.evaluate.during import plan_tasks

    return plan_tasks(config, model_config)


def _evaluation(job: Job, plan: "TaskPlan") -> "RunEvaluation":
    from trainer.evaluate.during import RunEvaluation

    return RunEvaluation(plan, job.run, job.base, job.home, job.session.stop, job.say)


def _run(job: Job) -> None:
    job.run.record(base_path=str(job.base), **{name: job.session.identity[name] for name in HASHES})
    set_seed(job.config.seed)
    trainer = _trained(job)
    state_dict = gathered(trainer)
    if rank() == 0:
        job.write_weights(trainer, state_dict, job.run.path)
    wait_for_all()
    del state_dict
    state = trainer.state
    figures = _last_evaluation(job, trainer)
    job.run.finish(
        "done",
        steps=state.global_step,
        train_loss=_last(state.log_history, "loss"),
        eval_loss=_last(state.log_history, "eval_loss"),
        output="model" if job.config.finetuning_type in WHOLE_METHODS else "adapter",
        **({"eval_tasks": figures} if figures else {}),
    )


def _last_evaluation(job: Job, trainer: Any) -> dict[str, float] | None:
    """Of the result, by the engine: the figures of its step, or made now."""
    if job.evaluation is None:
        return None
    evaluation, state = job.evaluation, trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    step = state.best_global_step if is_best else state.global_step
    return first_decides(lambda: evaluation.finish(step, job.run.path))


def _trained(job: Job) -> Any:
    """The stage's trainer, after training. Each stage imports only what it needs."""
    if job.config.stage in ("pt", "sft"):
        from trainer.stages.text import train_text

        return train_text(job)
    if job.config.stage == "ppo":
        from trainer.stages.ppo import train_ppo

        return train_ppo(job)
    from trainer.stages.preference import train_preference

    return train_preference(job)


def _options(config: TrainConfig) -> dict[str, Any]:
    return {"quantization_bit": config.quantization_bit, "finetuning_type": config.finetuning_type}


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def base_name(config: TrainConfig) -> str:
    """The base model's id for others: a hub id as it is, of a folder only its name."""
    folder = Path(config.model_name_or_path).expanduser()
    return folder.resolve().name if folder.is_dir() else config.model_name_or_path
