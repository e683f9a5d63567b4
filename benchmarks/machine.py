"""Where and when a number was measured, and the file it is kept in."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import server

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("starlette", "uvicorn", "uvicorn-worker", "gunicorn", "uvloop", "httptools", "msgspec", "tokenizers")


def describe() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": _system(),
            "load_average_before": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": {"qloop": server.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def package_versions(python: Path, *names: str) -> dict[str, str]:
    """Versions in another interpreter's environment; what is not there is left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    output = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output))


def save(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """As JSON; by default under `results/`, one file per benchmark and day."""
    path = path or RESULTS / f"{name}-{result['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _system() -> str:
    """`Linux 6.18 x86_64`: the rest of a kernel's name is this machine's own."""
    system = platform.uname()
    return f"{system.system} {'.'.join(system.release.split('.')[:2])} {system.machine}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
