"""Databases of text-to-SQL sets: where their files lie, and their schemas as CREATE TABLE statements.

A database is only ever opened for reading, and nothing of it is run; a name cannot leave the set's folder.
"""

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.data.rows import RowRefused
from trainer.data.values import values_of

TABLES = "tables.json"
_NAME = re.compile(r"[\w][\w .\-]{0,127}")
_FOLDERS = ("", "database", "databases", "test_database", "dev_databases")
_SUFFIXES = (".sqlite", ".db", ".sqlite3")
_STATEMENTS = """
    SELECT sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
    ORDER BY rowid LIMIT 1000
"""
_PLAIN = re.compile(r"[^\W\d]\w*")


class Databases:
    """The databases beside one file of questions. Each schema is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, tuple[str, Path | None]] = {}

    def find(self, name: str) -> tuple[str, Path | None]:
        """Schema and SQLite file, which is None where only `tables.json` knows the database. Raises RowRefused."""
        if name not in self._found:
            path = _database_path(self._folder, name)
            self._found[name] = (_schema_of(path), path) if path else (self._described.get(name, ""), None)
        schema, path = self._found[name]
        if not schema:
            raise RowRefused("no-schema", "neither the database's .sqlite file nor its schema in tables.json is there")
        return schema, path

    @cached_property
    def _described(self) -> dict[str, str]:
        """Schemas of Spider's `tables.json`; a database whose description is broken is left out."""
        path = self._folder / TABLES
        found = {}
        for value in (found.value for found in values_of(path)) if path.is_file() else ():
            if isinstance(value, dict):
                with suppress(KeyError, TypeError, IndexError, ValueError):
                    found[str(value["db_id"])] = _statements(value)
        return found


def _database_path(folder: Path, name: str) -> Path | None:
    """`<folder>/[database/][<name>/]<name>.sqlite`. Raises RowRefused for a name that is no file's name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise RowRefused("bad-database-name", "the database's name is no plain file name")
    folders = (folder / below / inner for below in _FOLDERS for inner in (name, ""))
    places = (place / f"{name}{suffix}" for place in folders for suffix in _SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def _schema_of(path: Path) -> str:
    """Raises RowRefused when the file is no database."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            rows = database.execute(_STATEMENTS).fetchall()
    except (sqlite3.Error, OSError, UnicodeError) as error:
        raise RowRefused(
            "bad-database", f"{path.name}: is not a SQLite file that can be read ({type(error).__name__})"
        ) from None
    if not rows:
        raise RowRefused("bad-database", f"{path.name}: holds no table")
    return "\n\n".join(f"{str(sql).strip()};" for (sql,) in rows)


def _statements(value: Mapping[str, Any]) -> str:
    """Spider's description of one database: parallel lists, columns and keys by index."""
    tables = [_quoted(name) for name in value["table_names_original"]]
    columns = [(int(table), str(name)) for table, name in value["column_names_original"]]
    types = [str(kind) for kind in value["column_types"]]
    primary = _indices(value.get("primary_keys", []))
    foreign = [(int(one), int(other)) for one, other in value.get("foreign_keys", [])]
    return "\n\n".join(
        _statement(number, table, tables, columns, types, primary, foreign)
        for number, table in enumerate(tables)
        if not table.startswith("sqlite_")  # SQLite's own
    )


def _statement(
    number: int,
    table: str,
    tables: list[str],
    columns: list[tuple[int, str]],
    types: list[str],
    primary: list[int],
    foreign: list[tuple[int, int]],
) -> str:
    own = [index for index, (place, _) in enumerate(columns) if place == number]
    lines = [f"{_quoted(columns[index][1])} {types[index].upper()}" for index in own]
    keys = [_quoted(columns[index][1]) for index in primary if index in own]
    if keys:
        lines.append(f"PRIMARY KEY ({', '.join(keys)})")
    for index, other in foreign:
        if index in own:
            target, column = columns[other]
            lines.append(f"FOREIGN KEY ({_quoted(columns[index][1])}) REFERENCES {tables[target]} ({_quoted(column)})")
    return f"CREATE TABLE {table} (\n  " + ",\n  ".join(lines) + "\n);"


def _indices(keys: Any) -> list[int]:
    """Plain, or in lists where a key has several columns."""
    return [int(index) for key in keys for index in (key if isinstance(key, list) else [key])]


def _quoted(name: Any) -> str:
    text = str(name)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace('"', '""') + '"'
