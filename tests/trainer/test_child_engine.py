"""The engine that evaluations ask ends with whoever started it, however that ends."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.services import wait_until

STARTS_ONE = """
import asyncio, sys
from pathlib import Path
from server.store.home import Home
from trainer.child_engine import child_engine, find_trial

async def main(model, work):
    trial = find_trial(model, Home(work / "home"), work)
    async with child_engine(trial, work / "s", {"engine": "fake"}) as client:
        print(client.engine_pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def test_no_engine_outlives_a_killed_command(fake_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_ONE, str(fake_model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 10, "the engine's end")
