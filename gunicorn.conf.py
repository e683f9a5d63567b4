"""Gunicorn's configuration: stands by itself (`gunicorn -c gunicorn.conf.py server.app:app`) and under the supervisor.

Gunicorn runs this file in its master, at the start and at every HUP. It imports the app here, so that workers are
forked with code and settings already in memory: they start at once, share pages, and one that replaces a killed
worker runs what the others run, whatever has happened to the files since.
"""

import gc
import importlib
import shutil
import sys
from pathlib import Path

# At a HUP the code of the last start is still imported; what is dropped here is read anew.
for _name in [name for name in sys.modules if name.partition(".")[0] in ("server", "webchat")]:
    del sys.modules[_name]
gc.collect()  # modules refer to themselves; the next ones find their memory free

from server.settings import inherit, load_settings, prepare_multiprocess_metrics  # noqa: E402

_settings = load_settings().settings
_metrics_folder = prepare_multiprocess_metrics(_settings)
inherit(_settings)
importlib.import_module("server.app")  # makes no app: that is each worker's

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.workers
# uvicorn's, measured beside Gunicorn's own `asgi` class; docs/operations.md has the figures and the reason.
worker_class = "server.ops.worker.Worker"
graceful_timeout = max(int(_settings.drain_timeout_s), 1)  # a worker that leaves finishes its streams first
timeout = 60
keepalive = 75
# Gunicorn's and uvicorn's info lines tell the story of every worker's birth; the supervisor and the app tell ours.
loglevel = "warning" if _settings.log_level == "info" else _settings.log_level
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None
proc_name = "qloop"
control_socket_disable = True  # its default path is one for all Gunicorns of a user


def on_starting(server):  # type: ignore[no-untyped-def]
    """Counters of the last run are not this run's."""
    shutil.rmtree(_metrics_folder, ignore_errors=True)
    _metrics_folder.mkdir(parents=True)


def post_fork(server, worker):  # type: ignore[no-untyped-def]
    """uvicorn's worker does not notice that its master was killed; the kernel does."""
    from server.ops.process import die_with_parent

    die_with_parent(server.pid)


def child_exit(server, worker):  # type: ignore[no-untyped-def]
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)
