"""A query on a SQLite file: read only, timed, bounded, in a child process of its own."""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.evaluate.scores import sql_child

Cell = int | float | str | bytes | None
MAX_ROWS: Final = 100_000
MAX_BYTES: Final = 16 << 20
_GRACE_S: Final = 1.0  # for a single function call inside SQLite, between whose steps nobody can look at the clock


@dataclass(frozen=True)
class Rows:
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class SqlFault:
    """Why there are no rows. `code`: timeout, not-allowed (a write, ATTACH, PRAGMA …), too-many-rows, too-big,
    several-statements, no-query, error (SQLite's complaint is the detail), database, journal, crash."""

    code: str
    detail: str


def run_query(database: Path, query: str, *, limit_s: float = 5.0) -> Rows | SqlFault:
    """The rows of one SELECT, or what is wrong with it. The file is never changed, and no error is raised.

    SQLite's authorizer lets SELECT, reading, functions and recursion through and nothing else. Bounds: `limit_s` of
    time, 100 000 rows, 16 MiB of rows, 1 MB a cell, 1 GiB of memory. A child process runs it, shared by all threads,
    one query at a time, and is ended and replaced where it does not answer. Text that is not UTF-8 has U+FFFD in it.
    """
    path = database.resolve()
    if not path.is_file():
        return SqlFault("database", f"{database.name}: no such file")
    for suffix in ("-wal", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.exists() and beside.stat().st_size:
            return SqlFault(
                "journal", f"{beside.name}: open the database with sqlite3 once, so that it is written back"
            )
    request = {
        "database": str(path),
        "query": query,
        "limit_s": limit_s,
        "max_rows": MAX_ROWS,
        "max_bytes": MAX_BYTES,
    }
    reply = _CHILD.ask(json.dumps(request), limit_s + _GRACE_S)
    if isinstance(reply, SqlFault):
        return reply
    if "fault" in reply:
        return SqlFault(reply["fault"], reply["detail"])
    return Rows(tuple(reply["columns"]), tuple(tuple(map(_cell, row)) for row in reply["rows"]))


def _cell(value: Any) -> Cell:
    found: Cell = bytes.fromhex(value["blob"]) if isinstance(value, dict) else value
    return found


class _Child:
    """The process, started at its first query; it ends when this process does, because its input closes then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str, limit_s: float) -> dict[str, Any] | SqlFault:
        with self._lock:
            process = self._running()
            try:
                line = _exchange(process, request.encode() + b"\n", time.monotonic() + limit_s)
            except TimeoutError:
                self.end()
                return SqlFault("timeout", f"no answer in {limit_s:g} s: the process was ended")
            except OSError as error:
                line, reason = b"", str(error)
            else:
                reason = "it ended"
            if not line.endswith(b"\n"):
                self.end()
                return SqlFault("crash", f"SQLite's process: {reason}")
            reply: dict[str, Any] = json.loads(line)
            return reply

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-I", "-S", sql_child.__file__]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        return self._process


def _exchange(process: "subprocess.Popen[bytes]", request: bytes, deadline: float) -> bytes:
    """One line there, one line back; what came before the process closed its output where it did. Raises
    TimeoutError."""
    assert process.stdin and process.stdout
    written = 0
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        writers = [process.stdin] if written < len(request) else []
        readable, writable, _ = select.select([process.stdout], writers, [], max(0.0, deadline - time.monotonic()))
        if writable:
            written += os.write(process.stdin.fileno(), request[written : written + select.PIPE_BUF])
        if readable:
            pieces.append(os.read(process.stdout.fileno(), 1 << 16))
            if not pieces[-1]:
                break
        if not readable and not writable:
            raise TimeoutError
    return b"".join(pieces)


_CHILD: Final = _Child()
atexit.register(_CHILD.end)
