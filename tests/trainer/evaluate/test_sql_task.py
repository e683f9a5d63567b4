"""text2sql as a task: what cannot be scored is named and counted, what is harmful does no harm, nothing is lost."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from server.store.hashes import file_hash
from tests.trainer.evaluate.scripted import Scripted
from trainer.evaluate.candidate import Answer, AnswerLimits, CandidateLost, Prompt
from trainer.evaluate.items import RefusedItem, SqlItem
from trainer.evaluate.results import ItemScore
from trainer.evaluate.scores import sql
from trainer.evaluate.scores.sql_run import run_query
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.sql import SqlTask

ANSWERS = {
    "right?": "```sql\nSELECT name FROM pet ORDER BY name\n```",
    "other?": "SELECT age FROM pet",
    "write?": "DROP TABLE pet",
    "attach?": "ATTACH DATABASE 'x' AS x",
    "prose?": "I do not know.",
}

SLOW = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "pets.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("create table pet (name, age); insert into pet values ('Ada', 3), ('Bo', 5);")
    return path


def item(question: str, database: Path | None, query: str = "SELECT name FROM pet ORDER BY name") -> SqlItem:
    return SqlItem(
        item_id=question,
        benchmark="pets",
        subject="pets",
        question=question,
        schema="CREATE TABLE pet (name, age);",
        queries=(query,),
        database=database,
        source="folder/pets.json",
        line=7,
    )


async def test_outcomes_and_what_cannot_be_scored(database: Path) -> None:
    before = database.read_bytes()
    items = [item(question, database) for question in ANSWERS]
    items += [item("broken?", database, "SELECT wings FROM pet"), item("schema?", None)]
    refused = RefusedItem(benchmark="pets", source="", line=1, code="not-a-query", detail="")
    task = SqlTask("sql/pets", items, EvalSettings(), [refused])
    assert (task.num_read, len(task.items)) == (8, 5)
    scores: list[ItemScore] = []
    await task.ask(Scripted(say=lambda shown: ANSWERS[shown.splitlines()[-1]]), task.items, scores.append)
    assert {score.item_id: score.details["outcome"] for score in scores} == {
        "right?": "same",
        "other?": "different-rows",
        "write?": "not-allowed",
        "attach?": "not-allowed",
        "prose?": "no-query",
    }
    result = task.result(scores)
    assert result.metrics["execution_accuracy"].mean == 0.2
    assert result.refused == {"not-a-query": 1, "gold-failed": 1, "no-database": 1}
    assert result.notes["broken"] == ["pets.json:7: error: no such column: wings"]
    assert database.read_bytes() == before


def run_counted(monkeypatch: pytest.MonkeyPatch, limit_s: float = 5.0) -> list[str]:
    """The queries that are run from now on; none may take longer than `limit_s`."""
    run: list[str] = []

    def counted(database: Path, query: str, **_: float) -> object:
        run.append(query)
        return run_query(database, query, limit_s=limit_s)

    monkeypatch.setattr(sql, "run_query", counted)
    return run


def test_only_drawn_items_have_their_queries_run(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_counted(monkeypatch)
    items = [item(f"{n}?", database, f"SELECT {n}") for n in range(9)] + [item("schema?", None)]
    task = SqlTask("sql/pets", items, EvalSettings(limit=2))
    assert sorted(run) == sorted(each.queries[0] for each in task.items) and len(run) == 2
    assert (task.num_read, task.refused) == (10, {"no-database": 1})
    broken = [item(f"{n}?", database, "SELECT wings FROM pet") for n in range(9)]
    assert SqlTask("sql/pets", broken, EvalSettings(limit=2)).refused == {"gold-failed": 2}


async def test_a_right_query_that_does_not_end_decides_nothing(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine: the same items are asked, and such a one is an error and has no score."""
    items = [item("slow?", database, SLOW), item("right?", database)]
    run_counted(monkeypatch, limit_s=0.2)
    task = SqlTask("sql/pets", items, EvalSettings())
    assert [each.item_id for each in task.items] == ["slow?", "right?"] and not task.refused
    scores: list[ItemScore] = []
    await task.ask(Scripted(say=lambda shown: ANSWERS["right?"]), task.items, scores.append)
    found = {score.item_id: score for score in scores}
    assert found["slow?"].details == {"error": "gold-timeout: the right query did not end"}
    assert found["slow?"].scores == {} and found["right?"].details["outcome"] == "same"


def test_the_digest_knows_what_a_database_holds_and_not_where_it_lies(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(*items: SqlItem) -> str:
        return SqlTask("sql/pets", items, EvalSettings()).digest

    before = digest(item("right?", database))
    monkeypatch.chdir(database.parent)
    assert digest(item("right?", Path("pets.sqlite"))) == before
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update pet set name = 'Ada Ada' where age = 3")
    assert digest(item("right?", database)) != before


def test_a_database_is_hashed_once_for_all_its_questions(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    monkeypatch.setattr("trainer.evaluate.tasks.sql.file_hash", counted)
    task = SqlTask("sql/pets", [item(f"{n}?", database, f"SELECT {n}") for n in range(5)], EvalSettings())
    assert task.digest == task.digest and hashed == [database]


async def test_plain_text_begins_the_query(database: Path) -> None:
    task = SqlTask("sql/pets", [item("right?", database)], EvalSettings(style="plain"))
    scores: list[ItemScore] = []
    candidate = Scripted(say=lambda shown: " name FROM pet ORDER BY name")
    await task.ask(candidate, task.items, scores.append)
    assert scores[0].scores == {"execution_accuracy": 1.0} and scores[0].answer.startswith("SELECT name")
    assert candidate.limits is not None and ";" in candidate.limits.stop


async def test_answers_before_the_candidate_died_are_scored(database: Path) -> None:
    class Dying(Scripted):
        async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
            if len(self.prompts) == 2:
                raise CandidateLost("gone")
            return await super()._answer(prompt, limits)

    items = [replace(item("right?", database), item_id=str(n)) for n in range(5)]
    task = SqlTask("sql/pets", items, EvalSettings())
    candidate = Dying(say=lambda shown: ANSWERS["right?"])
    candidate.max_in_flight = 1
    scores: list[ItemScore] = []
    with pytest.raises(CandidateLost):
        await task.ask(candidate, task.items, scores.append)
    assert [score.scores for score in scores] == [{"execution_accuracy": 1.0}] * 2
