"""An engine as a child process, and a client of it: what chat, eval, compare and verify ask is what would be served.

An adapter is put into a registry of its own for that time; the real registry stays as it is.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.engine.client import EngineClient
from server.errors import QloopError
from server.settings import environment_for_children
from server.store.home import Home
from server.store.model_folder import resolve_model
from trainer.errors import NotServable, TrainerError
from trainer.publish import publish
from trainer.results.adapter_folder import find_adapter, named_folder
from trainer.runs.run_folder import read_run

TRIAL = "trial"
_REFUSED = " is not served: "  # in the engine's log, before the reason
START_TIMEOUT_S = 1800.0  # a large model is read from a slow disk
STOP_S = 20.0


@dataclass(frozen=True)
class Trial:
    """What to ask: a model folder, and an adapter of its own registry if any."""

    model: Path
    home: Home
    adapter: str | None = None


def find_trial(name: str, home: Home, work: Path, base: str | None = None) -> Trial:
    """`name` is a run's id or folder, an adapter's folder, a published `name` or `name@revision`, or a model.

    `work` is a fresh folder with a short path: a Unix socket's may have 107 bytes. `base`: of an adapter, in place of
    the one that it names. Raises ConfigError or RegistryError for what cannot be served.
    """
    trial_home = Home(work)
    home.cache.mkdir(parents=True, exist_ok=True)
    trial_home.cache.symlink_to(home.cache.resolve())  # hashes of large models are computed once
    folder, named_base = named_folder(name, home) or (Path(name), None)
    if (folder / "run.json").is_file() and read_run(folder).get("output") == "model":
        return Trial(folder / "model", trial_home)
    if (folder / "run.json").is_file() or (folder / "adapter_config.json").is_file():
        found = find_adapter(folder, home, base or named_base)
        publish(folder, TRIAL, trial_home, base=str(found.base))
        return Trial(found.base, trial_home, TRIAL)
    return Trial(resolve_model(name, home), trial_home)


@contextlib.asynccontextmanager
async def child_engine(
    trial: Trial, socket: Path, settings: Mapping[str, Any] | None = None
) -> AsyncIterator[EngineClient]:
    """A running engine, ended on leaving. `settings` are the server's, by field, on top of the environment's.

    Raises TrainerError with the end of the engine's log when it does not come up.
    """
    given = {"home": trial.home.path, "model": str(trial.model), "engine_socket": socket, **(settings or {})}
    with _log(trial).open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "server.engine", "--parent-pid", str(os.getpid())],
            env=environment_for_children(given),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = EngineClient(socket, heartbeat_timeout_s=60.0)
    client.start()
    try:
        await _wait_ready(child, client, trial)
        yield client
    finally:
        await client.close()
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        child.kill()
        child.wait()


def adapter_id(client: EngineClient, trial: Trial) -> str | None:
    """The trial's adapter as the engine names it, `trial@revision`; None for a base model.

    Raises NotServable with the engine's reason when it refused the adapter: the base must not answer in its place.
    """
    if trial.adapter is None:
        return None
    found = next((info.id for info in client.adapters if info.name == trial.adapter), None)
    if found is None:
        reasons = [line.partition(_REFUSED)[2] for line in _log_lines(trial) if _REFUSED in line]
        raise NotServable(f"the engine does not serve this adapter: {reasons[-1] if reasons else last_words(trial)}")
    return found


def last_words(trial: Trial) -> str:
    """The last line of the engine's log: what it died of."""
    return (_log_lines(trial) or ["it said nothing"])[-1]


def _log_lines(trial: Trial) -> list[str]:
    return _log(trial).read_text(encoding="utf-8", errors="replace").strip().splitlines()


def _log(trial: Trial) -> Path:
    return trial.home.path / "engine.log"


async def _wait_ready(child: "subprocess.Popen[bytes]", client: EngineClient, trial: Trial) -> None:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while not client.is_ready:
        late = asyncio.get_running_loop().time() > deadline
        if child.poll() is not None or client.refusal or late:
            raise TrainerError(f"the engine did not start: {client.refusal or last_words(trial)}")
        with contextlib.suppress(QloopError):
            await client.wait_ready(0.5)
