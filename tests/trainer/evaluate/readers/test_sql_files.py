import json
import sqlite3
from pathlib import Path

import pytest

from tests.trainer.evaluate.readers import benchmark_files as files
from trainer.evaluate.items import SqlItem
from trainer.evaluate.read_items import read_items
from trainer.evaluate.readers.sql import split_queries


def sql_items(path: Path) -> list[SqlItem]:
    (found,) = read_items(path)
    assert not found.refused
    return [item for item in found.items if isinstance(item, SqlItem)]


def test_spider_with_a_database_and_with_a_schema_only(tmp_path: Path) -> None:
    pets, zoo = sql_items(files.spider(tmp_path / "spider_dk"))
    assert (pets.benchmark, pets.subject, pets.queries) == ("spider_dk", "pets", ("SELECT count(*) FROM pet",))
    assert pets.database == tmp_path / "spider_dk/database/pets/pets.sqlite"
    assert pets.schema == "CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT);"
    assert (zoo.database, zoo.schema.count("CREATE TABLE")) == (None, 2)


def test_a_schema_from_tables_json_runs_in_sqlite(tmp_path: Path) -> None:
    _, zoo = sql_items(files.spider(tmp_path))
    database = sqlite3.connect(":memory:")
    database.executescript(zoo.schema)
    assert [row[1] for row in database.execute("PRAGMA table_info('feed plan')")] == ["animal_id", "day"]
    assert [row[2:5] for row in database.execute("PRAGMA foreign_key_list('feed plan')")] == [
        ("animal", "animal_id", "id")
    ]
    database.close()


def test_defog_with_several_right_queries_and_instructions(tmp_path: Path) -> None:
    (item,) = sql_items(files.defog(tmp_path / "defog"))
    assert (item.benchmark, item.question) == ("defog", "Which?\nIgnore case")
    assert item.queries == ("SELECT name FROM pet WHERE name <> ';'", "SELECT id, name FROM pet")
    assert item.database is not None


def test_the_folder_of_defog_holds_nothing_else(tmp_path: Path) -> None:
    files.defog(tmp_path / "defog")
    (found,) = read_items(tmp_path / "defog")
    assert (len(found.items), found.refused) == (1, [])


def test_dbgpt_rows_carry_their_tables(tmp_path: Path) -> None:
    (item,) = sql_items(files.dbgpt(tmp_path))
    assert (item.question, item.queries) == ("which cities are big", ("SELECT city_name FROM city",))
    assert item.schema.startswith("CREATE TABLE city (")
    assert item.schema.endswith("length NUMERIC(4, 1)\n)")
    assert item.database is None


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("SELECT 1", ("SELECT 1",)),
        ("SELECT 1;", ("SELECT 1",)),
        ("SELECT ';' ; SELECT 2;", ("SELECT ';'", "SELECT 2")),
        ('SELECT 1 /* a;b */; SELECT "x;y"', ("SELECT 1 /* a;b */", 'SELECT "x;y"')),
        ("SELECT 1;;", ("SELECT 1",)),
        ("SELECT 'a;b", ("SELECT 'a;b",)),
        (" ; ;", ()),
        ("", ()),
    ],
)
def test_queries_are_parted_at_statements_only(text: str, queries: tuple[str, ...]) -> None:
    assert split_queries(text) == queries


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"query": ""}, "missing-query"),
        ({"query": "DROP TABLE pet"}, "not-a-query"),
        ({"query": "SELECT 1; DELETE FROM pet"}, "not-a-query"),
        ({"query": "ATTACH 'x' AS y"}, "not-a-query"),
        ({"query": "SELECT '" + ";" * 60_000}, "too-long"),
        ({"question": " "}, "missing-question"),
        ({"db_id": "unknown"}, "no-schema"),
        ({"db_id": "../pets"}, "bad-database-name"),
        ({"db_id": "/etc/passwd"}, "bad-database-name"),
        ({"db_id": "broken"}, "bad-database"),
        ({"db_id": "empty"}, "bad-database"),
    ],
)
def test_unusable_questions_are_refused_by_name(change: dict[str, str], code: str, tmp_path: Path) -> None:
    files.database(tmp_path / "pets/pets.sqlite")
    (tmp_path / "broken.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(200)))
    (tmp_path / "empty.sqlite").write_bytes(b"")
    good = {"db_id": "pets", "question": "How many?", "query": "SELECT count(*) FROM pet"}
    (found,) = read_items(files.write_json(tmp_path / "questions.json", [good, good, {**good, **change}]))
    assert [(item.line, item.code) for item in found.refused] == [(3, code)]
    assert len(found.items) == 2


def test_a_broken_description_of_one_database_costs_its_questions_only(tmp_path: Path) -> None:
    path = files.spider(tmp_path)
    broken = {**files.zoo_tables(), "db_id": "shop", "foreign_keys": [[4, 99]]}
    files.write_json(tmp_path / "tables.json", [broken, files.zoo_tables()])
    questions = [*json.loads(path.read_text()), {"db_id": "shop", "question": "?", "query": "SELECT 1"}]
    files.write_json(path, questions)
    (found,) = read_items(path)
    assert (len(found.items), [item.code for item in found.refused]) == (2, ["no-schema"])


def test_reading_leaves_the_database_as_it_is(tmp_path: Path) -> None:
    path = files.spider(tmp_path)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()}
    read_items(path)
    assert before == {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()
    }
