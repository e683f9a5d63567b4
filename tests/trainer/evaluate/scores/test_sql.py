"""SQL: what runs, what is refused and how it ends, which results are the same, and what is read from an answer."""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from trainer.evaluate.items import SqlItem
from trainer.evaluate.scores.sql import gold_faults, is_ordered, query_in, sql_score
from trainer.evaluate.scores.sql_rows import same_rows
from trainer.evaluate.scores.sql_run import Rows, SqlFault, run_query

SCHEMA = """
create table pet (pet_id integer primary key, kind text, weight real, owner_id int);
create table owner (owner_id integer primary key, name text, city text, age int);
insert into owner values (1, 'Ada', 'Köln', 30), (2, 'Ben', 'Köln', 41);
insert into owner values (3, 'Chen', '北京', 30), (4, 'Dora', '北京', 52);
insert into pet values (1, 'dog', 12.5, 1), (2, 'cat', 4.0, 1), (3, 'dog', 20.25, 2);
insert into pet values (4, 'cat', 4.0, 3), (5, 'bird', null, 3);
create table long (line text);
"""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """A database under an awkward name; afterwards it and its folder are as they were."""
    path = tmp_path / "a?b#c 100% 数据.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.executemany("insert into long values (?)", [("x" * 900,)] * 1000)
    connection.commit()
    connection.close()
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    yield path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def rows(database: Path, query: str) -> Rows:
    found = run_query(database, query)
    assert isinstance(found, Rows), found
    return found


def code(database: Path, query: str, limit_s: float = 5.0) -> str:
    found = run_query(database, query, limit_s=limit_s)
    return found.code if isinstance(found, SqlFault) else "rows"


def item(database: Path | None, *queries: str) -> SqlItem:
    return SqlItem(
        item_id="1", benchmark="own", subject="pets", question="?", schema="", queries=queries, database=database
    )


def test_every_type_of_cell_comes_back(database: Path) -> None:
    found = rows(database, "select 1, 2.5, 'é北', null, x'00ff', 1e999, 9223372036854775807 as big")
    assert found.rows == ((1, 2.5, "é北", None, b"\x00\xff", float("inf"), 9223372036854775807),)
    assert found.columns[-1] == "big"
    assert rows(database, "select * from pet where kind = 'fish'") == Rows(("pet_id", "kind", "weight", "owner_id"), ())


@pytest.mark.parametrize(
    "query",
    [
        "delete from pet",
        "update pet set weight = 1",
        "insert into pet values (9, 'x', 1, 1)",
        "drop table pet",
        "create table t (a)",
        "create temp table t (a)",
        "create view v as select 1",
        "alter table pet add x",
        "begin",
        "analyze",
        "attach 'other.sqlite' as other",
        "detach main",
        "vacuum",
        "vacuum into 'other.sqlite'",
        "replace into owner values (1, 'x', 'y', 2)",
        "pragma journal_mode = wal",
        "pragma writable_schema = 1",
        "select * from pragma_database_list",
        "select load_extension('x')",
        "with gone as (select 1) delete from pet",
    ],
)
def test_nothing_but_reading_is_allowed(database: Path, query: str) -> None:
    assert code(database, query) == "not-allowed"


ENDLESS = "with recursive n(x) as (select 1 union all select x + 1 from n) "


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (ENDLESS + "select count(*) from n", "timeout"),
        (ENDLESS + "select x from n", "too-many-rows"),
        (ENDLESS + "select hex(zeroblob(400000)) from n", "too-many-rows"),
        ("select count(*) from long a, long b, long c, long d", "timeout"),
        # One function call that takes minutes: no progress handler sees it, so the process itself is ended.
        (
            "select sum(length(replace(hex(zeroblob(490000)), hex(zeroblob(200000)) || '1', ''))) from long a, long b",
            "timeout",
        ),
        ("select randomblob(1000000000)", "too-big"),
        ("select group_concat(line) from (select a.line from long a, long b)", "too-big"),
        ("select 1; drop table pet", "several-statements"),
        ("", "no-query"),
        ("-- nothing", "no-query"),
        ("selec 1", "error"),
        ("select nothing from pet", "error"),
        ("select \0 1", "error"),
        ("select '\ud800'", "error"),
        ("select " + "(" * 3000 + "1" + ")" * 3000, "error"),
        ("select " + "1+" * 200_000 + "1", "error"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_every_bomb_ends_in_time_with_its_name(database: Path, query: str, expected: str) -> None:
    start = time.monotonic()
    limit_s = (
        0.5 if expected == "timeout" else 20.0
    )  # the others must come to their own bound first, on a slow machine too
    assert code(database, query, limit_s=limit_s) == expected
    assert time.monotonic() - start < limit_s + 5
    assert rows(database, "select count(*) from pet").rows == ((5,),)  # and the next query runs


@pytest.mark.parametrize(
    "query",
    [
        *(f"select {name} from pet" for name in ("full_name", "credit_limit", "authorized", "interrupted", "readonly")),
        'select "a".b from "too many pets"',
        "select p.weight from pet p, pet q where kind = 'full'",
        "select kind from pet limit 1 union select 1",
        "select limit_full(1)",
        "select from authorized",
    ],
)
def test_names_and_words_of_a_wrong_query_decide_nothing(database: Path, query: str) -> None:
    assert code(database, query) == "error"


def test_memory_is_bounded(database: Path) -> None:
    """A sort of endless large rows: it ends by time or memory, and this process stays as it is."""
    big = (
        ENDLESS.replace("select 1", "select 1, zeroblob(900000)")
        .replace("n(x)", "n(x, s)")
        .replace("x + 1", "x + 1, zeroblob(900000)")
    )
    assert code(database, big + "select x from n order by s desc, x", limit_s=1) in ("timeout", "too-big", "crash")
    assert code(database, "select 1") == "rows"


def test_files_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("hello " * 500)
    for path in (tmp_path / "text.sqlite", tmp_path / "none.sqlite", tmp_path):
        assert code(path, "select * from pet") == "database"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["text.sqlite"]


def test_a_damaged_file_is_the_databases_fault(tmp_path: Path) -> None:
    path = tmp_path / "damaged.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table pet (a)")
        connection.execute("insert into pet values (1)")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\x77" * (len(whole) - 4096))
    assert code(path, "select * from pet") == "database"


def test_a_journal_that_was_not_written_back_is_named(tmp_path: Path) -> None:
    path = tmp_path / "open.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("pragma journal_mode = wal")
    connection.execute("create table t (a)")
    connection.commit()
    assert code(path, "select * from t") == "journal"
    connection.close()  # writes it back
    assert rows(path, "select * from t").rows == ()


def test_many_threads_share_the_child(database: Path) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(rows(database, f"select {n}").rows[0][0] == n))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def table(*values: tuple[int | float | str | bytes | None, ...]) -> Rows:
    return Rows(tuple(f"c{index}" for index in range(len(values[0]) if values else 1)), values)


ONE = table((1, "a"), (2, "b"), (2, "b"))


@pytest.mark.parametrize(
    ("found", "unordered", "ordered"),
    [
        (ONE, True, True),
        (table((2, "b"), (1, "a"), (2, "b")), True, False),  # another sequence
        (table(("a", 1), ("b", 2), ("b", 2)), True, True),  # another order of the columns
        (table(("b", 2), ("a", 1), ("b", 2)), True, False),
        (table((1, "a"), (2, "b")), False, False),  # a duplicate is missing
        (table((1, "a"), (1, "a"), (2, "b")), False, False),  # another one is twice
        (table((1, "b"), (2, "a"), (2, "b")), False, False),  # equal columns, other rows
        (table((1.0000000001, "a"), (2.0, "b"), (2, "b")), True, True),
        (table((1.001, "a"), (2, "b"), (2, "b")), False, False),
        (table(("1", "a"), ("2", "b"), ("2", "b")), False, False),  # text is no number
        (table((1, "A"), (2, "b"), (2, "b")), False, False),
        (table((1, None), (2, "b"), (2, "b")), False, False),
        (table((1,), (2,), (2,)), False, False),
        (table((1, "a", 1), (2, "b", 2), (2, "b", 2)), False, False),
    ],
)
def test_same_rows_by_hand(found: Rows, unordered: bool, ordered: bool) -> None:
    assert same_rows(ONE, found, ordered=False) is unordered
    assert same_rows(found, ONE, ordered=False) is unordered
    assert same_rows(ONE, found, ordered=True) is ordered


def test_empty_and_null_and_nearly_equal() -> None:
    assert same_rows(Rows(("a",), ()), Rows(("b",), ()), ordered=True)
    assert not same_rows(Rows(("a",), ()), Rows(("a", "b"), ()), ordered=False)
    assert same_rows(table((None, 1), (b"x", 2)), table((b"x", 2), (None, 1)), ordered=False)
    third, other = 1 / 3, 0.1 + 0.2
    near = table((other, "a"), (third, "b")), table((third + 1e-12, "b"), (0.3, "a"))
    assert same_rows(*near, ordered=False) and not same_rows(*near, ordered=True)
    assert not same_rows(table((2**60,)), table((2**60 + 1,)), ordered=False)  # whole numbers are exact


def test_columns_with_the_same_values_are_tried_in_every_order() -> None:
    expected = table((1, 2, 3), (2, 3, 1), (3, 1, 2))
    turned = table((3, 1, 2), (1, 2, 3), (2, 3, 1))  # the same rows, each column at another place
    assert same_rows(expected, turned, ordered=True)
    wide = table(*(tuple((row + place) % 12 for place in range(12)) for row in range(12)))
    other = table(*(tuple((row * place) % 12 for place in range(12)) for row in range(12)))
    start = time.monotonic()
    assert same_rows(wide, wide, ordered=True) and not same_rows(wide, other, ordered=True)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("select a from t order by a", True),
        ("SELECT a FROM t ORDER  BY\n a LIMIT 3", True),
        ("select a from t", False),
        ("select a from (select a from t order by a)", False),
        ("select rank() over (order by a) from t", False),
        ("select 'order by' from t", False),
        ("select a from t -- order by a", False),
        ("select a from t /* x */ order /* y */ by a", True),
        ('select "order by" from t', False),
        ("select a from t where b in (select b from u order by b limit 1) order by a", True),
        ("select 'it''s (' from t order by 1", True),
    ],
)
def test_only_the_outermost_order_by_orders(query: str, ordered: bool) -> None:
    assert is_ordered(query) is ordered


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("select 1;", "select 1"),
        ("  SELECT 1 ; \n", "SELECT 1"),
        ("Here you are:\n```sql\nSELECT a\nFROM t;\n```\nIt lists all.", "SELECT a\nFROM t"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("```python\nprint(1)\n```\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("```sql\n-- all pets\nSELECT 1;\n```", "-- all pets\nSELECT 1"),
        ("The query is: SELECT a FROM t; it gives a.", "SELECT a FROM t"),
        ("查询语句：SELECT a FROM t。", "SELECT a FROM t。"),
        ("Use `SELECT a FROM t` for that.", "SELECT a FROM t"),
        ("SELECT a FROM t\n\nThis selects a.", "SELECT a FROM t"),
        ("SELECT ';' FROM t; ok", "SELECT ';' FROM t"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", "WITH x AS (SELECT 1) SELECT * FROM x"),
        ("With pleasure! SELECT 1", "SELECT 1"),
        ("I would write SELECT a FROM t", "SELECT a FROM t"),
        ("DROP TABLE pet;", "DROP TABLE pet"),
        ("SELECT 1; DROP TABLE pet;", "SELECT 1; DROP TABLE pet"),
        ("I do not know.", None),
        ("", None),
        ("```python\nprint(1)\n```", None),
    ],
)
def test_the_query_is_taken_out_of_an_answer(answer: str, query: str | None) -> None:
    assert query_in(answer) == query


GOLD = "SELECT DISTINCT o.city, o.name FROM owner o JOIN pet p ON p.owner_id = o.owner_id WHERE p.weight > 3"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOLD, "same"),
        ("select name, city from owner where owner_id in (select owner_id from pet where weight > 3)", "same"),
        (GOLD.replace("DISTINCT ", ""), "different-rows"),
        (GOLD.replace("o.city, o.name", "o.city, o.age"), "different-rows"),
        (GOLD.replace("o.city, o.name", "o.city"), "different-rows"),
        (GOLD.replace("> 3", "> 4"), "different-rows"),
        (GOLD + " LIMIT 2", "different-rows"),
        (GOLD.replace("JOIN pet", "LEFT JOIN cat"), "error"),
        ("DELETE FROM pet", "not-allowed"),
        ("I cannot tell.", "no-query"),
    ],
)
def test_planted_answers(database: Path, answer: str, expected: str) -> None:
    assert sql_score(item(database, GOLD), f"```sql\n{answer};\n```") == (float(expected == "same"), expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("SELECT name FROM owner ORDER BY age DESC LIMIT 2", "same"),
        ("SELECT name FROM owner ORDER BY -age LIMIT 2", "same"),
        ("SELECT name FROM owner ORDER BY age DESC LIMIT 3", "different-rows"),
        ("SELECT name FROM owner ORDER BY age DESC LIMIT 2 OFFSET 1", "different-rows"),
        ("SELECT name FROM (SELECT name, age FROM owner ORDER BY age DESC LIMIT 2) ORDER BY age", "different-rows"),
    ],
)
def test_the_sequence_counts_where_the_right_query_orders(database: Path, answer: str, expected: str) -> None:
    assert sql_score(item(database, "SELECT name FROM owner ORDER BY age DESC LIMIT 2"), answer)[1] == expected


def test_several_right_queries_and_broken_ones(database: Path) -> None:
    several = item(database, "SELECT name FROM ownr", "SELECT name FROM owner", "SELECT owner_id FROM owner")
    assert sql_score(several, "SELECT owner_id FROM owner ORDER BY 1 DESC") == (1.0, "same")
    assert sql_score(several, "SELECT city FROM owner") == (0.0, "different-rows")
    faults = gold_faults(several)
    assert list(faults) == ["SELECT name FROM ownr"] and "no such table" in faults["SELECT name FROM ownr"].detail
    assert sql_score(item(database, "SELECT x x x"), "SELECT 1") == (0.0, "gold-failed")
    assert sql_score(item(None, "SELECT 1"), "SELECT 1") == (0.0, "no-database")
    assert gold_faults(item(None, "SELECT 1"))["SELECT 1"].code == "no-database"


def test_a_right_query_that_did_not_end_might_have_been_met(database: Path) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    either = item(database, endless, "SELECT name FROM owner")
    assert sql_score(either, "SELECT name FROM owner", limit_s=0.2) == (1.0, "same")
    assert sql_score(either, "SELECT city FROM owner", limit_s=0.2) == (0.0, "gold-timeout")
    assert sql_score(item(database, endless), "SELECT 1", limit_s=0.2) == (0.0, "gold-timeout")
