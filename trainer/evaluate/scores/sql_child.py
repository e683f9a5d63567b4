"""The child that runs one query after another for `sql`, as `python sql_child.py`. Imports nothing of ours.

What a query can do to it stays in it: it may end, grow to its limit or hang, and is then replaced. It writes no file,
because the kernel allows it none (RLIMIT_FSIZE 0), whatever SQLite might be talked into.

One JSON object a line: {database, query, limit_s, max_rows, max_bytes} in; {columns, rows} or {fault, detail} out,
where a blob is {"blob": hex}.
"""

import contextlib
import json
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY_BYTES = 1 << 30
CELL_BYTES = 1_000_000
STEPS_BETWEEN_CHECKS = 1000  # of SQLite's virtual machine: well under a millisecond
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: CELL_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
# SQLite's words for a query that asks for too much.
TOO_BIG = ("too big", "out of memory", "full", "limit", "too many", "disk I/O error")


def main() -> None:
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        sys.stdout.write(reply(json.loads(line)) + "\n")
        sys.stdout.flush()


def reply(request: dict[str, Any]) -> str:
    try:
        return json.dumps(answer(request))
    except MemoryError:
        return json.dumps({"fault": "too-big", "detail": f"more than {MEMORY_BYTES >> 20} MiB of memory"})


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a query gives, or why it gives nothing."""
    try:
        with opened(Path(request["database"])) as connection:
            restrict(connection, request["limit_s"])
            return rows_of(connection, request)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return {"fault": fault_of(str(error)), "detail": str(error)}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, read only; `immutable` because SQLite then looks for no journal beside it and takes no lock."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def restrict(connection: sqlite3.Connection, limit_s: float) -> None:
    """Nothing but reading, in bounded cells, memory and time."""
    for name, value in LIMITS.items():
        connection.setlimit(name, value)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute("PRAGMA query_only=ON")
    connection.set_authorizer(allowed)
    deadline = time.monotonic() + limit_s
    connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_BETWEEN_CHECKS)


def allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    is_call = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in ("load_extension", "fts3_tokenizer")
    return sqlite3.SQLITE_OK if action in ALLOWED or is_call else sqlite3.SQLITE_DENY


def rows_of(connection: sqlite3.Connection, request: dict[str, Any]) -> dict[str, Any]:
    cursor = connection.execute(request["query"])
    if cursor.description is None:
        return {"fault": "no-query", "detail": "the statement gives no rows"}
    rows, num_bytes = [], 0
    for row in cursor:
        rows.append([{"blob": cell.hex()} if isinstance(cell, bytes) else cell for cell in row])
        num_bytes += sum(len(cell) if isinstance(cell, str | bytes) else 8 for cell in row)
        if len(rows) > request["max_rows"] or num_bytes > request["max_bytes"]:
            bound = f"more than {request['max_rows']} rows or {request['max_bytes']} bytes"
            return {"fault": "too-many-rows", "detail": bound}
    return {"columns": [column[0] for column in cursor.description], "rows": rows}


def fault_of(message: str) -> str:
    if "interrupted" in message:
        return "timeout"
    if "authoriz" in message or "prohibited" in message or "readonly" in message:
        return "not-allowed"
    if "one statement" in message:
        return "several-statements"
    if "unable to open" in message or "not a database" in message or "malformed database" in message:
        return "database"
    return "too-big" if any(words in message for words in TOO_BIG) else "error"


if __name__ == "__main__":
    main()
