"""Execution accuracy of text2sql: whether the query in an answer gives what the right query gives."""

import re
from typing import Final

from trainer.evaluate.items import SqlItem
from trainer.evaluate.scores.sql_rows import same_rows
from trainer.evaluate.scores.sql_run import Rows, SqlFault, run_query

_FENCE: Final = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WRITES: Final = "INSERT|UPDATE|DELETE|REPLACE|DROP|CREATE|ALTER|ATTACH|DETACH|PRAGMA|VACUUM|REINDEX|ANALYZE|EXPLAIN"
_READS: Final = r"SELECT\b|VALUES\s*\(|WITH\s+(?:RECURSIVE\s+)?[^\s(]+\s*(?:\([^)]*\)\s*)?AS\b"
_STATEMENT: Final = re.compile(rf"(?:{_READS}|(?:{_WRITES})\b)", re.IGNORECASE)
# Where a statement may start without a fence: at a line's start, or after a colon or a back quote.
_START: Final = re.compile(rf"(?:^|(?<=[`:：]))[ \t]*(?={_READS}|(?:{_WRITES})\b)", re.IGNORECASE | re.MULTILINE)
_ANYWHERE: Final = re.compile(rf"\b(?={_READS})", re.IGNORECASE)
_TOKEN: Final = re.compile(
    r"--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|\w+|.", re.DOTALL
)

# Faults that another run of the same query on the same file may not have: the machine was busy, or short of memory.
PASSING: Final = frozenset(("timeout", "crash"))


def query_in(answer: str) -> str | None:
    """The SQL of an answer: its first fenced block that starts as SQL does, else from the first line that does (or
    the first SELECT) to the semicolon, the closing back quote or the empty line. No closing semicolon; None where
    there is none."""
    blocks = [_stripped(block[2]) for block in _FENCE.finditer(answer)]
    fenced = next((block for block in blocks if _STATEMENT.match(_without_comments(block))), None)
    if fenced is not None:
        return fenced
    start = _START.search(answer) or _ANYWHERE.search(answer)
    return _statement(answer[start.end() :], answer[: start.end()].endswith("`")) if start else None


def is_ordered(query: str) -> bool:
    """Whether the outermost query has ORDER BY: one inside brackets, a comment or a string does not order the
    result."""
    depth, previous = 0, ""
    for token in _TOKEN.findall(query):
        depth += (token == "(") - (token == ")")
        if depth == 0 and previous == "ORDER" and token.upper() == "BY":
            return True
        if not token.isspace() and not token.startswith(("--", "/*")):
            previous = token.upper() if depth == 0 else ""
    return False


def gold_faults(item: SqlItem, *, limit_s: float = 5.0) -> dict[str, SqlFault]:
    """The item's own queries that do not run, with the reason. An item all of whose queries are in it cannot be
    scored."""
    if item.database is None:
        return {query: SqlFault("no-database", "only a schema came with it") for query in item.queries}
    results = {query: run_query(item.database, query, limit_s=limit_s) for query in item.queries}
    return {query: result for query, result in results.items() if isinstance(result, SqlFault)}


def sql_score(item: SqlItem, answer: str, *, limit_s: float = 5.0) -> tuple[float, str]:
    """(1.0, "same") where the answer's query gives the rows of one of the item's queries, else 0.0 and why.

    Codes: different-rows, no-query (none in the answer), a `SqlFault`'s code, and for the item gold-failed (none of
    its queries runs), gold-timeout and gold-crash (one that might have been met did not end, so nothing is said of the
    answer) and no-database. The sequence of rows counts against a query that has ORDER BY (`is_ordered`), and then
    among equal keys too, as in Spider's evaluation.
    """
    if item.database is None:
        return 0.0, "no-database"
    gold = [(query, run_query(item.database, query, limit_s=limit_s)) for query in item.queries]
    passing = [result.code for _, result in gold if isinstance(result, SqlFault) and result.code in PASSING]
    expected = [(query, result) for query, result in gold if isinstance(result, Rows)]
    if not expected:
        return 0.0, f"gold-{passing[0]}" if passing else "gold-failed"
    query = query_in(answer)
    if query is None:
        return 0.0, "no-query"
    found = run_query(item.database, query, limit_s=limit_s)
    if isinstance(found, SqlFault):
        return 0.0, found.code
    if any(same_rows(rows, found, ordered=is_ordered(right)) for right, rows in expected):
        return 1.0, "same"
    return 0.0, f"gold-{passing[0]}" if passing else "different-rows"


def _statement(text: str, is_quoted: bool) -> str:
    """Up to where the statement ends; with what follows a semicolon if that is a statement, so that it is noticed."""
    end = len(text)
    place = 0
    for token in _TOKEN.findall(text.partition("`")[0] if is_quoted else text):
        if token == ";":
            end = len(text) if _STATEMENT.match(_without_comments(text[place + 1 :])) else place
            break
        if token == "\n" and re.match(r"[ \t\r]*\n", text[place + 1 :]):
            end = place
            break
        place += len(token)
    else:
        end = place
    return _stripped(text[:end])


def _without_comments(text: str) -> str:
    return "".join(token for token in _TOKEN.findall(text) if not token.startswith(("--", "/*"))).strip()


def _stripped(text: str) -> str:
    return text.strip().rstrip("; \t\r\n")
