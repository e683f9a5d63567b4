"""The life of one run around its training: claimed, started, stopped or failed or done, and its curves in any case."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import EXIT_INTERRUPTED, Stopped
from trainer.ranks import first_decides, rank
from trainer.runs.resume import Start, choose_start, claim_run, command_hash
from trainer.runs.run_folder import RunFolder
from trainer.runs.stop import StopSignals


@dataclass(frozen=True)
class Session:
    """A started run: where it writes, where it begins, who can stop it, and what its checkpoints belong to."""

    run: RunFolder
    start: Start
    stop: StopSignals
    identity: Mapping[str, Any]


@contextmanager
def run_session(config: TrainConfig, runs: Path, identity: Mapping[str, Any]) -> Iterator[Session]:
    """Claim a run, enter it, and leave it in a state that says how it ended; the caller records `done`.

    `identity` is `run_identity(...)`. Every process of the run enters; the first one writes. Raises ConfigError and
    DriftError before anything in the folder has changed.
    """
    held: list[RunFolder] = []

    def claim() -> tuple[Path, Start]:
        held.append(claim_run(config, runs))
        return held[0].path, choose_start(held[0], config, identity, say)

    try:
        path, start = first_decides(claim)
        run = held[0] if held else RunFolder(path, writes=False)
        with StopSignals() as stop:
            run.start(config=asdict(config), command_hash=command_hash(config))
            run.forget_after(start.step)
            _announce(run, start)
            with _ending(run, draws=config.plot_loss and rank() == 0):
                yield Session(run, start, stop, identity)
    finally:
        for run in held:
            run.unlock()


def say(text: str) -> None:
    """A line for the one who started the run."""
    print(text, file=sys.stderr, flush=True)


def _announce(run: RunFolder, start: Start) -> None:
    if start.checkpoint is None:
        run.append_event("started")
        return
    run.append_event("resumed", step=start.step, checkpoint=start.checkpoint.name, changed=list(start.changed))
    if rank() == 0:
        say(f"run {run.id} goes on from {start.checkpoint.name}")


@contextmanager
def _ending(run: RunFolder, draws: bool) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        code = error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED
        run.finish("stopped", error=str(error), exit_code=code)
        raise
    except BaseException as error:
        run.finish("failed", error=f"{type(error).__name__}: {error}", exit_code=getattr(error, "exit_code", 1))
        raise
    finally:
        if draws:
            _draw(run)


def _draw(run: RunFolder) -> None:
    """A picture that cannot be drawn must not hide how the run ended."""
    try:
        from trainer.runs.curves import redraw

        redraw(run.path)
    except Exception as error:
        say(f"the curves could not be drawn ({error}); `python -m trainer plot {run.id}` tries again")
