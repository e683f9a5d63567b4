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
# By SQLite's primary result code: its words hold names of columns, which may be any words.
BY_CODE = {
    sqlite3.SQLITE_INTERRUPT: "timeout",
    sqlite3.SQLITE_AUTH: "not-allowed",
    sqlite3.SQLITE_READONLY: "not-allowed",
    sqlite3.SQLITE_CANTOPEN: "database",
    sqlite3.SQLITE_NOTADB: "database",
    sqlite3.SQLITE_CORRUPT: "database",
    sqlite3.SQLITE_TOOBIG: "too-big",
    sqlite3.SQLITE_NOMEM: "too-big",
    sqlite3.SQLITE_FULL: "too-big",
    sqlite3.SQLITE_IOERR: "too-big",  # it may write no file
}
# By how its words begin, where the code does not tell.
BY_WORDS = {
    "not authorized": "not-allowed",
    "You can only execute one statement": "several-statements",
    "too many ": "too-big",
}


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
        return {"fault": fault_of(error), "detail": str(error)}


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


def fault_of(error: Exception) -> str:
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # Python's own errors have none
    told = (fault for words, fault in BY_WORDS.items() if str(error).startswith(words))
    return BY_CODE.get(primary) or next(told, "error")


if __name__ == "__main__":
    main()
