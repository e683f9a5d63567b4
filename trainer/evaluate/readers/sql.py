"""One record -> a question about a database. Knows Spider and its kin, defog's sql-eval, and DB-GPT-Hub's rows."""

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.rows import RowRefused
from trainer.data.turns import text_of
from trainer.evaluate.readers.schema import Databases

_NAME_KEYS = ("db_id", "db_name")
_QUERY_KEYS = ("query", "SQL", "sql", "output")
_LONGEST = 50_000  # characters of right queries
_CREATE = re.compile(r"CREATE\s+TABLE\b", re.IGNORECASE)
_QUERY = re.compile(r"\s*(?:SELECT|WITH)\b", re.IGNORECASE)
_COMMENT = re.compile(r"^\s*--[ \t]?(.*)$", re.MULTILINE)
_TASK = re.compile(r"using valid sqlite|for the tables provided above", re.IGNORECASE)


@dataclass
class Query:
    """A question before it has a name and a place."""

    database_name: str
    question: str
    schema: str
    queries: tuple[str, ...]
    database: Path | None
    notes: tuple[str, ...] = ()


def is_sql(record: Mapping[str, Any]) -> bool:
    if _schema_in_text(record):
        return isinstance(record.get("output"), str)
    has_name = any(isinstance(record.get(key), str) for key in _NAME_KEYS)
    return has_name and "question" in record and any(key in record for key in _QUERY_KEYS)


def query_of(record: Mapping[str, Any], databases: Databases) -> Query:
    """Raises RowRefused."""
    key = next((key for key in _QUERY_KEYS if record.get(key)), None)
    if key is None:
        raise RowRefused("missing-query", "there is no right query")
    text = text_of(record[key], key)
    if len(text) > _LONGEST:
        raise RowRefused("too-long", f"the right query has {len(text)} characters")
    queries = split_queries(text)
    if not queries:
        raise RowRefused("missing-query", "there is no right query")
    if not all(map(_QUERY.match, queries)):
        raise RowRefused("not-a-query", "a right query begins with neither SELECT nor WITH")
    if _schema_in_text(record):
        return _with_own_schema(record, queries)
    name = text_of(next((record[key] for key in _NAME_KEYS if record.get(key)), None), "the database's name")
    question = _question(record)
    schema, path = databases.find(name)
    return Query(name, question, schema, queries, path, () if path else ("no-database",))


def split_queries(text: str) -> tuple[str, ...]:
    """Queries that are parted by `;`, without it. One within a string or a comment parts nothing."""
    found, start = [], 0
    for end in (match.end() for match in re.finditer(";", text)):
        if sqlite3.complete_statement(text[start:end]):
            found.append(text[start : end - 1])
            start = end
    found.append(text[start:])
    return tuple(query.strip() for query in found if query.strip())


def _question(record: Mapping[str, Any]) -> str:
    question = text_of(record.get("question"), "question").strip()
    if not question:
        raise RowRefused("missing-question", "the question is empty")
    more = [text_of(record[key], key).strip() for key in ("instructions", "evidence") if record.get(key)]
    return "\n".join(filter(None, (question, *more)))


def _schema_in_text(record: Mapping[str, Any]) -> bool:
    text = record.get("instruction")
    return isinstance(text, str) and _CREATE.search(text) is not None


def _with_own_schema(record: Mapping[str, Any], queries: tuple[str, ...]) -> Query:
    """CREATE TABLEs, then the question as SQL comments, or in `input`."""
    text = text_of(record["instruction"], "instruction")
    tables = [match.start() for match in _CREATE.finditer(text)]
    end = _statement_end(text, tables[-1])
    asked = text_of(record.get("input") or "", "input").strip()
    if not asked:
        comments = [match[1].strip() for match in _COMMENT.finditer(text, end)]
        asked = "\n".join(comment for comment in comments if comment and not _TASK.search(comment))
    asked = asked or text[end:].rstrip().removesuffix("SELECT").strip(" \t\r\n;")
    if not asked:
        raise RowRefused("missing-question", "no question stands behind the tables")
    name = text_of(record.get("db_id") or "database", "db_id")
    return Query(name, asked, text[tables[0] : end], queries, None, ("no-database",))


def _statement_end(text: str, start: int) -> int:
    """Behind the bracket that closes the table's columns."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth <= 0:
            return match.end()
    return len(text)
