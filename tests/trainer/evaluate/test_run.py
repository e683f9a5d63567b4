"""An evaluation that is stopped goes on, loses nothing, and never mixes with another one."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from server.store.home import Home
from tests.trainer.evaluate.scripted import Scripted, choice, text
from trainer.errors import DataError, DriftError
from trainer.evaluate.candidate import Answer, AnswerLimits, CandidateLost, ItemFailed, Prompt
from trainer.evaluate.eval_folder import EvalFolder, read_result, read_scores
from trainer.evaluate.open_candidate import CandidateOptions
from trainer.evaluate.run import evaluate
from trainer.evaluate.session import Evaluated, evaluate_name, evaluation_id
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.table import table
from trainer.evaluate.tasks.choice import ChoiceTask
from trainer.evaluate.tasks.likelihood import LikelihoodTask
from trainer.evaluate.tasks.text import BbhTask

SETTINGS = EvalSettings()


class Dying(Scripted):
    """Goes away after so many answers."""

    def __init__(self, lives: int, fails: Callable[[str], bool] = lambda shown: False) -> None:
        super().__init__(say=lambda shown: "yes")
        self.lives, self.fails = lives, fails
        self.max_in_flight = 1

    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        if self.lives == 0:
            raise CandidateLost("scripted: gone")
        self.lives -= 1
        if self.fails(prompt.shown):
            raise ItemFailed("http-400: not this one")
        return await super()._answer(prompt, limits)


def tasks(settings: EvalSettings = SETTINGS) -> list[BbhTask]:
    return [BbhTask("bbh/bench", [text(f"q{n}", "yes" if n % 2 else "no") for n in range(10)], settings)]


async def run(candidate: Scripted, folder: Path, settings: EvalSettings = SETTINGS) -> object:
    return await evaluate(candidate, tasks(settings), folder, settings, shows_progress=False)


async def test_a_candidate_that_dies_half_way(tmp_path: Path) -> None:
    with pytest.raises(CandidateLost, match=r"gone\. 4 of 10 items are kept in .*; run the same command again"):
        await run(Dying(4), tmp_path)
    assert len(read_scores(tmp_path)) == 4
    with pytest.raises(ConfigError, match="no finished evaluation"):
        read_result(tmp_path)
    again = Dying(99)
    result = await run(again, tmp_path)
    assert len(again.prompts) == 6  # nothing is asked twice
    assert read_result(tmp_path) == result
    assert result.tasks[0].metrics["exact_match"].mean == 0.5 and result.tasks[0].num_scored == 10  # type: ignore[attr-defined]
    assert result.speed["num_items"] == 6  # type: ignore[attr-defined]


async def test_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    await run(Dying(99), tmp_path)
    items = tmp_path / "items.jsonl"
    items.write_bytes(items.read_bytes()[:-20])
    again = Dying(99)
    await run(again, tmp_path)
    assert len(again.prompts) == 1 and len(read_scores(tmp_path)) == 10
    assert all(json.loads(line) for line in items.read_text().splitlines())


async def test_an_item_that_failed_counts_as_wrong_and_is_asked_again(tmp_path: Path) -> None:
    result = await run(Dying(99, fails=lambda shown: shown == "q1?"), tmp_path)
    assert result.tasks[0].metrics["exact_match"].mean == 0.4  # type: ignore[attr-defined]
    assert result.tasks[0].notes["errors"] == {"http-400": 1}  # type: ignore[attr-defined]
    again = Dying(99)
    result = await run(again, tmp_path)
    assert [prompt.shown for prompt in again.prompts] == ["q1?"]
    assert result.tasks[0].metrics["exact_match"].mean == 0.5  # type: ignore[attr-defined]


async def test_another_evaluation_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    await run(Dying(99), tmp_path)
    with pytest.raises(DriftError, match=r"settings\.max_tokens: 256, now 9"):
        await run(Dying(99), tmp_path, replace(SETTINGS, max_tokens=9))
    with pytest.raises(DriftError, match=r'candidate\.fingerprint: "f", now "g"'):
        await run(Scripted(fingerprint="g"), tmp_path)
    other = [BbhTask("bbh/bench", [text("q0", "other")], SETTINGS), ChoiceTask("choice/mmlu", [choice("a")], SETTINGS)]
    with pytest.raises(DriftError, match=r"tasks\.bbh/bench\.digest: .*tasks\.choice/mmlu: null, now"):
        await evaluate(Dying(99), other, tmp_path, SETTINGS, shows_progress=False)


async def test_asked_again_all_is_forgotten(tmp_path: Path) -> None:
    await run(Dying(99), tmp_path)
    changed = replace(SETTINGS, max_tokens=9)
    candidate = Dying(99)
    await evaluate(candidate, tasks(changed), tmp_path, changed, again=True, shows_progress=False)
    assert len(candidate.prompts) == 10 and len((tmp_path / "items.jsonl").read_text().splitlines()) == 10


async def test_asked_again_with_another_limit_all_is_forgotten(tmp_path: Path) -> None:
    await run(Dying(99), tmp_path)
    limited = replace(SETTINGS, limit=4)
    await evaluate(Dying(99), tasks(limited), tmp_path, limited, again=True, shows_progress=False)
    assert len(read_scores(tmp_path)) == 4


@pytest.mark.parametrize(
    ("candidate", "questions", "says"),
    [
        (Scripted(fingerprint="g"), tasks(), r'candidate\.fingerprint: "f", now "g"'),
        (Scripted(), [BbhTask("bbh/bench", [text("q0", "other")], SETTINGS)], r"tasks\.bbh/bench\.digest: "),
        (Scripted(), [BbhTask("bbh/other", tasks()[0].items, SETTINGS)], r"tasks\.bbh/bench: .*, now null"),
    ],
)
async def test_asked_again_another_evaluation_is_not_forgotten(
    tmp_path: Path, candidate: Scripted, questions: list[BbhTask], says: str
) -> None:
    before = await run(Dying(99), tmp_path)
    with pytest.raises(DriftError, match=says):
        await evaluate(candidate, questions, tmp_path, SETTINGS, again=True, shows_progress=False)
    assert read_result(tmp_path) == before and len(read_scores(tmp_path)) == 10


async def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    await run(Dying(99), tmp_path)
    items = tmp_path / "items.jsonl"
    lines = items.read_bytes().splitlines(keepends=True)
    items.write_bytes(b"".join([*lines[:3], b'{"item_id": 3}\n', *lines[4:]]))
    with pytest.raises(DataError, match=r"items\.jsonl, line 4: .*delete that line"):
        await run(Dying(99), tmp_path)


async def test_results_hold_no_nan(tmp_path: Path) -> None:
    """One item has no interval, and one that failed no likelihood: JSON has no word for either."""
    found = [
        LikelihoodTask("likelihood/one", [text("a", "yes")], SETTINGS),
        LikelihoodTask("likelihood/none", [text("b", "refused")], SETTINGS),
        ChoiceTask("choice/mmlu", [choice("c")], SETTINGS),
    ]
    result = await evaluate(Scripted(), found, tmp_path, SETTINGS, shows_progress=False)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for file in ("result.json", "items.jsonl", "eval.json"):
        for document in (tmp_path / file).read_text().splitlines() if file == "items.jsonl" else [None]:
            json.loads(document or (tmp_path / file).read_text(), parse_constant=refuse)
    assert read_result(tmp_path) == result
    assert result.tasks[0].metrics["perplexity"].low is None and result.tasks[1].metrics == {}
    shown = "\n".join(table(result))
    assert "nan" not in shown.lower() and "likelihood/none  log_likelihood  -" in shown


async def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder; choose another --output"):
        await run(Dying(99), tmp_path / "file")


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from pathlib import Path; from trainer.evaluate.eval_folder import EvalFolder\n"
    code += "with EvalFolder(Path(sys.argv[1])): print('mine')"
    with EvalFolder(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "another process is evaluating" in done.stderr


class Url(Dying):
    """As a server without a template answers: nothing."""

    def __init__(self, fails: Callable[[str], bool] = lambda shown: True) -> None:
        super().__init__(99, fails)
        self.info = replace(self.info, kind="url", fingerprint="")


def as_url(candidate: Dying) -> Dying:
    candidate.info = replace(candidate.info, kind="url")
    return candidate


async def test_nothing_answered_is_no_result(tmp_path: Path) -> None:
    says = r"scripted: bbh/bench: none of 10 items was answered \(http-400: not this one\)"
    for _ in range(2):
        with pytest.raises(CandidateLost, match=rf"{says}; for a model without a chat template try --plain"):
            await run(Url(), tmp_path / "url")
    assert not (tmp_path / "url" / "result.json").exists()
    assert (await run(Url(lambda shown: False), tmp_path / "url")).tasks[0].metrics["exact_match"].mean == 0.5  # type: ignore[attr-defined]


async def test_an_engine_that_answers_nothing_has_a_broken_model_and_a_result(tmp_path: Path) -> None:
    result = await run(Dying(99, fails=lambda shown: True), tmp_path)
    assert result.tasks[0].notes["num_errors"] == 10  # type: ignore[attr-defined]


async def test_nothing_answered_since_a_stop_is_no_result_either(tmp_path: Path) -> None:
    with pytest.raises(CandidateLost):
        await run(as_url(Dying(4)), tmp_path)
    with pytest.raises(CandidateLost, match="none of 6 items was answered"):
        await run(as_url(Dying(99, fails=lambda shown: True)), tmp_path)


async def test_what_fails_for_good_is_not_asked_again(tmp_path: Path) -> None:
    candidate = Scripted()
    settings = EvalSettings()
    task = LikelihoodTask("likelihood/h", [text("a", "yes"), text("b", "refused")], settings)
    for _ in range(2):
        result = await evaluate(candidate, [task], tmp_path, settings, shows_progress=False)
        assert result.tasks[0].notes["errors"] == {"context_length_exceeded": 1}
    assert len(candidate.prompts) == 2


def test_figures_by_other_rules_are_another_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = set()
    for rules in (1, 2):
        monkeypatch.setattr("trainer.evaluate.run.RULES", rules)
        ids.add(evaluation_id(Scripted(), tasks(), SETTINGS))
    assert len(ids) == 2


async def test_items_that_fail_again_beside_answered_ones_are_a_result(tmp_path: Path) -> None:
    for _ in range(2):
        result = await run(Dying(99, fails=lambda shown: shown in ("q1?", "q2?", "q3?", "q4?")), tmp_path)
        assert result.tasks[0].notes["num_errors"] == 4  # type: ignore[attr-defined]


async def test_a_result_is_away_while_items_are_asked_again(tmp_path: Path) -> None:
    await run(Dying(99, fails=lambda shown: shown == "q1?"), tmp_path)
    with pytest.raises(CandidateLost, match="9 of 10 items are kept"):
        await run(Dying(0), tmp_path)
    with pytest.raises(ConfigError, match="no finished evaluation"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("style", "has_template", "asked"), [("auto", True, "chat"), ("auto", False, "plain"), ("plain", True, "plain")]
)
async def test_the_style_is_noted(tmp_path: Path, style: Any, has_template: bool, asked: str) -> None:
    settings = EvalSettings(style=style)
    candidate = Scripted(say=lambda shown: "yes")
    candidate.has_template = has_template
    chats = [*tasks(settings), LikelihoodTask("likelihood/chat", [text("a", "yes")], settings)]
    texts = [LikelihoodTask("likelihood/text", [text("b", "a text", messages=())], settings)]
    result = await evaluate(candidate, [*chats, *texts], tmp_path, settings, shows_progress=False)
    assert [task.notes["style"] for task in result.tasks] == [asked, asked, "plain"]
    assert all(prompt.is_plain == (asked == "plain") for prompt in candidate.prompts[:-1])


# ---- by name


@pytest.fixture
def by_name(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Evaluated]:
    """`evaluate_name` for a candidate that is there already."""

    def ask(candidate: Scripted, output: Path | None = None, settings: EvalSettings = SETTINGS) -> Evaluated:
        @contextlib.asynccontextmanager
        async def opened(*_: object) -> AsyncIterator[Scripted]:
            yield candidate

        monkeypatch.setattr("trainer.evaluate.session.open_candidate", opened)
        given = CandidateOptions()
        return evaluate_name("s", tasks(settings), home, settings, given, output=output, shows_progress=False)

    return ask


def test_a_finished_evaluation_with_failed_items_asks_those_again(
    by_name: Callable[..., Evaluated], capsys: pytest.CaptureFixture[str]
) -> None:
    by_name(Dying(99, fails=lambda shown: shown == "q1?"))
    again = Dying(99)
    done = by_name(again)
    assert [prompt.shown for prompt in again.prompts] == ["q1?"] and not done.was_finished
    assert "1 not answered on" in capsys.readouterr().err
    assert done.result.tasks[0].metrics["exact_match"].mean == 0.5
    assert by_name(Dying(0)).was_finished


@pytest.mark.parametrize("output", [None, "out"])
def test_a_url_that_does_not_say_what_it_serves_is_always_asked_anew(
    by_name: Callable[..., Evaluated], tmp_path: Path, output: str | None
) -> None:
    folder = tmp_path / output if output else None
    for _ in range(2):
        candidate = Url(fails=lambda shown: False)
        assert not by_name(candidate, folder).was_finished and len(candidate.prompts) == 10
    engine = Dying(99)
    by_name(engine)
    assert len(engine.prompts) == 10 and by_name(Dying(0)).was_finished


def test_asking_anew_does_not_forget_another_evaluation(by_name: Callable[..., Evaluated], tmp_path: Path) -> None:
    by_name(Url(fails=lambda shown: False), tmp_path / "out")
    with pytest.raises(DriftError, match=r"settings\.max_tokens: 256, now 9"):
        by_name(Url(), tmp_path / "out", replace(SETTINGS, max_tokens=9))
    assert len(read_scores(tmp_path / "out")) == 10
