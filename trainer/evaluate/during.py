"""A run in training, evaluated as it would be served: an engine of its own gets the weights of that step, and ends.

A fresh engine each time, so that between two evaluations all memory is the training's. Knows neither loop nor model.
"""

import asyncio
import contextlib
import re
import shlex
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.home import Home
from server.store.registry import CONFIG_NAME, RegistryError
from server.store.servability import servable
from trainer.config import TrainConfig
from trainer.errors import DataError, Stopped, TrainerError, first_line
from trainer.evaluate.engine_candidate import engine_candidate
from trainer.evaluate.eval_folder import RESULT, read_result
from trainer.evaluate.results import EvalResult
from trainer.evaluate.run import evaluate
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.table import figure, span
from trainer.evaluate.tasks.make import make_tasks
from trainer.evaluate.tasks.task import Task
from trainer.methods.plan import planned_config
from trainer.options.checks import WHOLE_METHODS
from trainer.runs.run_folder import RunFolder
from trainer.runs.stop import StopSignals

EVALS, WEIGHTS = "evals", "weights"
# Not vllm, which takes nearly all of a GPU's memory and a minute to start.
ENGINE = "hf"
WATCH_S = 0.2
# Writes the weights into a folder, as `adapter` or `model`.
Write = Callable[[Path], None]
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class TaskPlan:
    """What is asked at each evaluation. `command` does the same after training. `is_whole`: no adapter is trained."""

    is_whole: bool
    tasks: tuple[Task[Any], ...]
    settings: EvalSettings
    engine: Mapping[str, Any]
    command: str


def plan_tasks(config: TrainConfig, model_config: Mapping[str, Any]) -> TaskPlan | None:
    """Reads every file of `eval_tasks`; None where there are none.

    Raises ConfigError or DataError, naming the task, and ConfigError for a method that no engine serves unmerged.
    """
    if not config.eval_tasks:
        return None
    _check_method(config, str(model_config.get("model_type")))
    settings = EvalSettings(limit=config.eval_task_limit)
    try:
        tasks = make_tasks(config.eval_tasks, settings)
    except (ConfigError, DataError) as error:
        raise type(error)(f"eval_tasks: {str(error).removeprefix('--task ')}") from None
    engine = {"engine": ENGINE, "trust_remote_code": config.trust_remote_code}
    is_whole = config.finetuning_type in WHOLE_METHODS
    return TaskPlan(is_whole, tuple(tasks), settings, engine, _command("RUN", config))


def _check_method(config: TrainConfig, model_type: str) -> None:
    if config.finetuning_type in WHOLE_METHODS:
        return
    verdict = servable(planned_config(config), model_type)
    if ENGINE not in verdict.backends:
        raise ConfigError(
            f"eval_tasks: {'; '.join(verdict.notes)}. Leave eval_tasks out, and evaluate after training: "
            f"python -m trainer merge RUN merged/, then {_command('merged/', config)}"
        )


def _command(name: str, config: TrainConfig) -> str:
    tasks = " ".join(f"--task {shlex.quote(task)}" for task in config.eval_tasks)
    limit = f" --limit {config.eval_task_limit}" if config.eval_task_limit else ""
    return f"python -m trainer eval {name} {tasks}{limit}"


class RunEvaluation:
    """Of one run, in its first process. Results lie in `evals/step-N` of its folder, figures in metrics.jsonl."""

    def __init__(
        self,
        plan: TaskPlan,
        run: RunFolder,
        base: Path,
        home: Home,
        stop: StopSignals,
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._run = run
        self._base = base
        self._home = home
        self._stop = stop
        self._say = say
        self._failures: dict[int, str] = {}

    def forget_after(self, step: int) -> None:
        """Drop the results of later steps, which are about to be made again."""
        for folder in (self._run.path / EVALS).glob("step-*"):
            if (match := _STEP.fullmatch(folder.name)) and int(match[1]) > step:
                shutil.rmtree(folder)

    def prove(self, step: int, write: Write) -> None:
        """As `measure`, before the first step of training: of an adapter, which changes nothing yet, the base.

        Raises TrainerError: it would not work later, either."""
        try:
            if self._plan.is_whole:
                self._measure_aside(step, write)
            else:
                self._measure(step, self._base)
        except Stopped:
            raise
        except (ConfigError, TrainerError, RegistryError, OSError) as error:
            command = self._plan.command
            raise TrainerError(f"eval_tasks: {error}. Leave it out, and evaluate after training: {command}") from error

    def measure(self, step: int, write: Write) -> None:
        """Evaluate what `write` writes, the weights of `step`. What goes wrong is told: a figure is worth less than the
        run."""
        self._try(step, lambda: self._measure_aside(step, write))

    def finish(self, step: int, result: Path) -> dict[str, float] | None:
        """Figures of the run's result, the weights of `step`, which lie in `result`; None without any."""
        if not self._is_measured(step):
            self._stop.is_training = True  # a signal ends the evaluation; the run is done
            try:
                self._try(step, lambda: self._measure(step, _written(result)))
            finally:
                self._stop.is_training = False
        if self._failures:
            steps = ", ".join(map(str, self._failures))
            reason = list(self._failures.values())[-1]
            self._say(f"eval_tasks: not evaluated at step {steps} ({reason}); afterwards: {self._command()}")
        return figures(read_result(self._folder(step))) if self._is_measured(step) else None

    def _try(self, step: int, measure: Callable[[], None]) -> None:
        try:
            measure()
        except Stopped:
            raise
        except Exception as error:
            self._failures[step] = first_line(error)
            self._run.append_event("evaluation of tasks failed", step=step, error=f"{type(error).__name__}: {error}")
            self._say(f"warning: step {step}: eval_tasks: {error}; the run goes on")

    def _measure_aside(self, step: int, write: Write) -> None:
        aside = self._run.path / EVALS / WEIGHTS
        try:
            write(aside)
            self._measure(step, _written(aside))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _measure(self, step: int, weights: Path) -> None:
        began = time.perf_counter()
        shutil.rmtree(self._folder(step), ignore_errors=True)
        result = asyncio.run(_unless_stopped(self._ask(step, weights), self._stop))
        if result is None:
            self._run.append_event("evaluation of tasks left out", step=step, reason="asked to stop")
            return
        self._run.append_metrics({"step": step, **figures(result)})
        self._run.append_event("tasks evaluated", step=step, seconds=round(time.perf_counter() - began, 3))
        self._say(f"step {step}: {told(result)}")

    async def _ask(self, step: int, weights: Path) -> EvalResult:
        plan = self._plan
        base = str(self._base) if (weights / CONFIG_NAME).is_file() else None
        async with engine_candidate(str(weights), self._home, plan.engine, base=base) as candidate:
            candidate.info = replace(candidate.info, name=f"{self._run.id}-step-{step}")
            return await evaluate(candidate, plan.tasks, self._folder(step), plan.settings, shows_progress=False)

    def _folder(self, step: int) -> Path:
        return self._run.path / EVALS / f"step-{step}"

    def _is_measured(self, step: int) -> bool:
        return (self._folder(step) / RESULT).is_file()

    def _command(self) -> str:
        return self._plan.command.replace("RUN", shlex.quote(self._run.id), 1)


def _written(folder: Path) -> Path:
    return next(path for name in ("model", "adapter") if (path := folder / name).is_dir())


def figures(result: EvalResult) -> dict[str, float]:
    """Each task's main figure, as `choice/mmlu/accuracy`."""
    return {
        f"{task.task}/{task.main_metric}": task.metrics[task.main_metric].mean
        for task in result.tasks
        if task.main_metric in task.metrics
    }


def told(result: EvalResult) -> str:
    """`choice/mmlu accuracy 0.4100 (0.3100 … 0.5100)`, and the others; what was not answered is said."""
    texts = []
    for task in result.tasks:
        found = task.metrics.get(task.main_metric)
        text = f"{figure(found.mean)} ({span(found)})" if found else "-"
        failed = task.notes.get("num_errors", 0)
        texts.append(f"{task.task} {task.main_metric} {text}" + (f", {failed} not answered" if failed else ""))
    return "; ".join(texts)


async def _unless_stopped(work: Coroutine[Any, Any, EvalResult], stop: StopSignals) -> EvalResult | None:
    """None when a signal asks the run to stop: a checkpoint is worth more than a figure."""
    task = asyncio.ensure_future(work)
    while not task.done() and stop.requested is None:
        await asyncio.wait([task], timeout=WATCH_S)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await task
    return None
