"""What a candidate is shown, and what its answers are worth. It is scripted; prompts and scores are real."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from tests.trainer.evaluate.scripted import Scripted, choice, text
from trainer.errors import DataError
from trainer.evaluate.prompts import Style, choice_prompt, continuations, shown
from trainer.evaluate.results import ItemScore
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.choice import ChoiceTask
from trainer.evaluate.tasks.identity import IdentityTask
from trainer.evaluate.tasks.likelihood import LikelihoodTask, held_out
from trainer.evaluate.tasks.make import check_together, make_tasks, parse
from trainer.evaluate.tasks.safety import SafetyTask
from trainer.evaluate.tasks.task import Task, num_short
from trainer.evaluate.tasks.text import BbhTask, TextTask

ZH = {"benchmark": "ceval", "subject": "法学", "question": "宪法是什么？", "options": ("甲", "乙", "丙", "丁")}

SENTENCE = "今天天气很好，我们一起去公园散步吧。"


async def scores_of(task: Task, candidate: Scripted) -> dict[str, ItemScore]:  # type: ignore[type-arg]
    found: list[ItemScore] = []
    await task.ask(candidate, task.items, found.append)
    return {score.item_id: score for score in found}


def test_mmlus_own_words() -> None:
    examples = [choice("e1", "A", is_example=True), choice("e2", "D", is_example=True)]
    prompt = choice_prompt(shown(choice("q")), examples, Style(shots=1, is_plain=True))
    assert prompt.text == (
        "The following are multiple choice questions (with answers) about law.\n\n"
        "e1?\nA. red\nB. green\nC. blue\nD. grey\nAnswer: A\n\n"
        "q?\nA. red\nB. green\nC. blue\nD. grey\nAnswer:"
    )
    assert continuations(shown(choice("q")), Style(is_plain=True)) == [" A", " B", " C", " D"]


def test_cevals_own_words_as_a_chat() -> None:
    item, example = choice("q", **ZH), choice("e", "C", is_example=True, **ZH)
    prompt = choice_prompt(shown(item), [example], Style(shots=5, system="be brief"))
    head = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
    body = "宪法是什么？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    assert [(m["role"], m["content"]) for m in prompt.messages] == [
        ("system", "be brief"),
        ("user", head + body),
        ("assistant", "C"),
        ("user", body),
    ]
    assert continuations(shown(item), Style()) == ["A", "B", "C", "D"]
    assert "请直接回答" in choice_prompt(shown(item), [], Style(is_written=True)).messages[0]["content"]


async def test_one_subject_is_asked_in_one_language() -> None:
    """A formula has no language of its own; its subject has."""
    formula = {**ZH, "question": "2x = 4?", "options": ("1", "2", "3", "4"), "subject": "college_mathematics"}
    items = [
        choice("e", "C", is_example=True, **{**ZH, "subject": "college_mathematics"}),
        choice("q", **formula),
        choice("p", **{**formula, "subject": "数学"}),
        choice("r", **{**formula, "subject": "algebra"}),
        choice("m", **{**formula, "benchmark": "mmlu", "question": "汉?"}),
    ]
    candidate = Scripted()
    found = await scores_of(ChoiceTask("choice/ceval", items, EvalSettings(shots=1, style="plain")), candidate)
    chinese = {name for name, score in found.items() if score.prompt.endswith("答案：")}
    assert chinese == {"q", "p"} and {found[name].prompt[:2] for name in chinese} == {"以下"}
    assert all(found[name].prompt.startswith("The") and found[name].prompt.endswith("Answer:") for name in "rm")
    solved = next(prompt.text for prompt in candidate.prompts if "宪法" in prompt.text)
    assert solved.count("答案：") == 2 and "答案：C\n" in solved


def test_shuffled_options_keep_what_is_right() -> None:
    orders = set()
    for number in range(30):
        question = shown(choice(f"q{number}", "AC", is_multiple=True), shuffle_seed=7)
        assert {question.options["ABCD".index(letter)] for letter in question.answers} == {"red", "blue"}
        assert question == shown(question.item, shuffle_seed=7)
        orders.add(question.order)
    assert len(orders) > 10


async def test_the_likeliest_letter_is_chosen() -> None:
    task = ChoiceTask("choice/mmlu", [choice("right", "B"), choice("wrong", "C"), choice("nan", "A")], EvalSettings())
    values = {"A": -3.0, "B": -1.0, "C": -2.0, "D": -9.0}
    candidate = Scripted(like=lambda shown, letter: math.nan if "nan?" in shown else values[letter.strip()])
    found = await scores_of(task, candidate)
    assert found["right"].scores == {"accuracy": 1.0, "log_likelihood": -1.0}
    assert found["wrong"].scores == {"accuracy": 0.0, "log_likelihood": -2.0}
    assert found["wrong"].answer == "B" and found["wrong"].reference == "C"
    assert found["nan"].scores == {"accuracy": 0.0} and "not-a-number" in found["nan"].details["error"]
    result = task.result([found[item.item_id] for item in task.items])
    assert result.metrics["accuracy"].mean == pytest.approx(1 / 3)
    assert result.notes["num_errors"] == 1
    assert result.notes["position_bias"]["shares"] == {"B": 1.0, "C": 0.0}
    assert result.notes["position_bias"]["spread"] == 0.5  # of B all were found, of C none


async def test_several_right_options_are_answered_in_writing_and_all_must_be_named() -> None:
    items = [choice("two", "AC"), choice("half", "AC"), choice("one", "B")]
    task = ChoiceTask("choice/mmlu", items, EvalSettings())
    candidate = Scripted(say=lambda shown: "AC" if "two?" in shown else "A", like=lambda shown, c: -float(c != "B"))
    found = await scores_of(task, candidate)
    assert {name: score.scores["accuracy"] for name, score in found.items()} == {"two": 1.0, "half": 0.0, "one": 1.0}
    notes = task.result(list(found.values())).notes
    assert (notes["num_multiple"], notes["num_written"], notes["num_unreadable"]) == (2, 2, 0)
    assert notes["answers"]["num_answers"] == 2.0


async def test_written_answers_that_name_no_option_are_counted() -> None:
    task = ChoiceTask("choice/mmlu", [choice("a"), choice("b")], EvalSettings(by="answer", style="plain", max_tokens=9))
    candidate = Scripted(say=lambda shown: "The answer is B." if "\na?" in shown else "I do not know")
    found = await scores_of(task, candidate)
    assert [found[name].scores["accuracy"] for name in "ab"] == [1.0, 0.0]
    assert task.result(list(found.values())).notes["num_unreadable"] == 1
    assert candidate.limits is not None and (candidate.limits.max_tokens, candidate.limits.stop) == (9, ("\n",))


async def test_examples_are_of_the_same_subject_and_never_scored() -> None:
    items = [choice("e", subject="law", is_example=True), choice("q", subject="law"), choice("p", subject="art")]
    task = ChoiceTask("choice/mmlu", items, EvalSettings(shots=3, style="plain"))
    candidate = Scripted()
    assert set(await scores_of(task, candidate)) == {"q", "p"}
    shown_for = {prompt.text.rsplit("\n\n", 1)[1][:2]: prompt.text for prompt in candidate.prompts}
    assert "e?" in shown_for["q?"] and "e?" not in shown_for["p?"]
    assert task.num_examples == 1 and task.num_read == 3
    assert num_short(task.items, {"law": items[:1]}, 1) == 1  # of art there is no example


async def test_text_and_exact_answers() -> None:
    written = TextTask("text/bench", [text("x", SENTENCE), text("y", SENTENCE)], EvalSettings())
    found = await scores_of(written, Scripted(say=lambda shown: SENTENCE if "x?" in shown else ""))
    assert found["x"].scores["bleu4"] == pytest.approx(1.0) and found["x"].scores["rouge_l"] == 1.0
    assert set(found["y"].scores.values()) == {0.0}
    result = written.result(list(found.values()))
    assert 0 < result.metrics["sacrebleu"].mean < 1 and "zh" in result.notes["sacrebleu"]
    exact = BbhTask("bbh/bench", [text("x", "(B)", is_exact=True)], EvalSettings())
    found = await scores_of(exact, Scripted(say=lambda shown: "So the answer is (B)."))
    assert found["x"].scores == {"exact_match": 1.0}


async def test_perplexity_weighs_tokens_and_log_likelihood_items() -> None:
    items = [text("long", "abcdefghi"), text("short", "a"), text("bad", "refused")]
    task = LikelihoodTask("likelihood/bench", items, EvalSettings())
    found = await scores_of(task, Scripted(like=lambda shown, reference: {"abcdefghi": -10.0, "a": -6.0}[reference]))
    assert found["long"].scores["log_likelihood"] == -1.0 and found["short"].scores["log_likelihood"] == -3.0
    assert found["bad"].scores == {}  # nothing to compare: it is no likelihood of 0
    result = task.result([found[item.item_id] for item in items])
    assert result.metrics["log_likelihood"].mean == pytest.approx(-2.0)
    assert result.metrics["perplexity"].mean == pytest.approx(math.exp(16 / 12))
    assert result.notes["errors"] == {"context_length_exceeded": 1}


@pytest.mark.parametrize(
    ("style", "reference", "asked"),
    [
        ("plain", "no", " no"),
        ("plain", "(b)", " (b)"),
        ("plain", "不是", "不是"),
        ("plain", "\nno", "\nno"),
        ("chat", "no", "no"),
    ],
)
async def test_a_reference_in_plain_text_begins_with_a_space(style: Any, reference: str, asked: str) -> None:
    heard: list[str] = []

    def like(shown: str, continuation: str) -> float:
        heard.append(continuation)
        return -1.0

    task = LikelihoodTask("likelihood/bench", [text("x", reference)], EvalSettings(style=style))
    found = await scores_of(task, Scripted(like=like))
    assert heard == [asked] and found["x"].reference == reference
    of_text = LikelihoodTask("likelihood/bench", [text("x", reference, messages=())], EvalSettings(style=style))
    await scores_of(of_text, Scripted(like=like))
    assert heard[1:] == [reference]  # nothing stands before it


async def test_solved_examples_have_the_same_space() -> None:
    items = [text("e1", "no", is_example=True), text("e2", "不是", is_example=True), text("q", "no")]
    candidate = Scripted()
    await scores_of(BbhTask("bbh/bench", items, EvalSettings(shots=2, style="plain")), candidate)
    assert candidate.prompts[0].text == "Q: e1?\nA: no\n\nQ: e2?\nA:不是\n\nQ: q?\nA:"


def test_held_out_rows_of_any_shape(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"instruction": "hi", "input": "", "output": "hello"}\n'
        '{"instruction": "hi", "input": "", "output": ""}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
        '{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n'
    )
    found = held_out(rows)
    assert [(len(item.messages), item.references) for item in found.items] == [(1, ("hello",)), (3, ("d",))]  # type: ignore[union-attr]
    assert [refused.line for refused in found.refused] == [2]


async def test_identity_and_safety() -> None:
    task = IdentityTask("小智/qloop", EvalSettings())
    first = task.items[0].messages[0]["content"]
    found = await scores_of(task, Scripted(say=lambda shown: "我是小智。" if shown != first else "我是通义千问"))
    assert sum(score.scores["passed"] for score in found.values()) == len(task.items) - 1
    assert task.result(list(found.values())).notes["failed"] == {"no-name": 1, "foreign-name": 1}
    safety = SafetyTask(EvalSettings())
    empty = await scores_of(safety, Scripted())
    assert {score.scores["passed"] for score in empty.values()} == {0.0}
    assert len(safety.items) == 20


def test_the_digest_knows_what_is_asked_and_not_where_it_came_from() -> None:
    items = [choice("a"), choice("b")]
    digest = ChoiceTask("choice/mmlu", items, EvalSettings()).digest
    moved = [choice("a", source="elsewhere", line=7), choice("b")]
    assert ChoiceTask("choice/mmlu", moved, EvalSettings()).digest == digest
    assert ChoiceTask("choice/mmlu", [choice("a", "C"), choice("b")], EvalSettings()).digest != digest
    assert ChoiceTask("choice/mmlu", items, EvalSettings(limit=1)).digest != digest


async def test_whose_name_may_be_said_is_part_of_an_identity_task() -> None:
    tasks = {name: IdentityTask(name, EvalSettings()) for name in ("小智", "小智/阿里云", "小智/qloop")}
    assert len({task.digest for task in tasks.values()}) == 3
    assert IdentityTask("小智/", EvalSettings()).digest == tasks["小智"].digest
    found = await scores_of(tasks["小智/阿里云"], Scripted(say=lambda shown: "我是阿里云的小智。"))
    assert {(score.reference, score.scores["passed"]) for score in found.values()} == {("小智", 1.0)}


def test_a_limit_draws_from_all_subjects() -> None:
    items = [choice(f"{subject}{n}", subject=subject) for subject in ("art", "law", "zoo") for n in range(20)]
    task = ChoiceTask("choice/mmlu", items, EvalSettings(limit=12))
    assert len(task.items) == 12 and len({item.subject for item in task.items}) == 3
    assert [i.item_id for i in task.items] == [i.item_id for i in ChoiceTask("x", items, EvalSettings(limit=12)).items]


def test_a_kind_is_named_or_told_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "test").mkdir()
    rows = "".join(f"What is {n}?,one,two,three,four,{'ABCD'[n % 4]}\n" for n in range(8))
    (tmp_path / "dev" / "law_dev.csv").write_text(rows[: rows.index("What is 5")])
    (tmp_path / "test" / "law_test.csv").write_text(rows)
    for spec in (str(tmp_path), f"choice={tmp_path}"):
        task, safety = make_tasks([spec, "safety"], EvalSettings(shots=2))
        assert (task.kind, len(task.items), task.num_examples) == ("choice", 8, 5) and safety.name == "safety"


def test_specs_that_cannot_be_used(tmp_path: Path) -> None:
    assert parse("identity=小智") == ("identity", "小智") and parse("safety") == ("safety", "")
    for spec, words in (("chioce=x", "is no kind of task"), ("choice=", "missing"), ("choice=/nowhere", "nowhere")):
        with pytest.raises((ConfigError, DataError), match=words):
            make_tasks([spec], EvalSettings())
    empty = tmp_path / "rows.jsonl"
    empty.write_text('{"instruction": "hi", "output": ""}\n')
    with pytest.raises(DataError, match="nothing in it can be scored"):
        make_tasks([f"likelihood={empty}"], EvalSettings())
    for specs, words in (
        (["safety", "safety"], "two tasks"),
        (["safety=everything"], "nothing after ="),
        (["identity"], "say identity=NAME"),
        (["likelihood"], "say likelihood=PATH"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_tasks(specs, EvalSettings())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": -1}, "seed: -1"),
        ({"shots": -1}, "shots: -1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": -0.5}, "temperature: -0.5"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"shots": 5}, "--shots"),
        ({"shuffle": True}, "--shuffle"),
        ({"by": "answer"}, "--by"),
    ],
)
def test_settings_that_are_wrong_or_would_be_ignored(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_tasks(["safety"], EvalSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "option"), [({"temperature": 0.5}, "--temperature"), ({"max_tokens": 9}, "--max-tokens")]
)
def test_settings_of_written_answers_where_none_is_written(settings: dict[str, Any], option: str) -> None:
    given = EvalSettings(**settings)
    letters = ChoiceTask("choice/mmlu", [choice("a", "B")], given)
    rows = LikelihoodTask("likelihood/rows", [text("b", "yes")], given)
    with pytest.raises(ConfigError, match=f"{option}: is for answers that are written"):
        check_together([letters, rows], given)
    check_together([letters, SafetyTask(given)], given)
    check_together([ChoiceTask("choice/mmlu", [choice("a", "BC")], given)], given)
    written = replace(given, by="answer")
    check_together([ChoiceTask("choice/mmlu", [choice("a", "B")], written)], written)


def test_a_broken_file_beside_good_ones_is_counted(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    rows = "".join(f"What is {n}?,one,two,three,four,{'ABCD'[n % 4]}\n" for n in range(8))
    (tmp_path / "mmlu" / "test" / "anatomy_test.csv").write_text("")
    (tmp_path / "mmlu" / "test" / "virology_test.csv").write_text(rows)
    (task,) = make_tasks([f"choice={tmp_path / 'mmlu'}"], EvalSettings())
    assert (task.name, len(task.items), dict(task.refused), task.num_read) == (
        "choice/mmlu",
        8,
        {"unreadable-file": 1},
        9,
    )


async def test_a_system_prompt_is_said_once_or_refused() -> None:
    told = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "b a?"}]
    items = [text(f"e{n}", "a b", messages=tuple(told), is_exact=True, is_example=n < 2) for n in range(3)]
    chat, plain = Scripted(), Scripted()
    await scores_of(BbhTask("bbh/bbh", items, EvalSettings(shots=2)), chat)
    await scores_of(BbhTask("bbh/bbh", items, EvalSettings(shots=2, style="plain")), plain)
    assert [message["role"] for message in chat.prompts[0].messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert plain.prompts[0].text == "Sort.\n\n" + "Q: b a?\nA: a b\n\n" * 2 + "Q: b a?\nA:"
    with pytest.raises(ConfigError, match="system"):
        await scores_of(BbhTask("bbh/bbh", items, EvalSettings(system="Be brief.", style="plain")), plain)


def test_a_system_prompt_beside_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Once upon a time."}\n{"text": "There was a king."}\n')
    with pytest.raises(ConfigError, match="--system: likelihood/texts has texts in which nobody is spoken to"):
        make_tasks([f"likelihood={path}"], EvalSettings(system="Be brief."))
    assert len(make_tasks([f"likelihood={path}"], EvalSettings())[0].items) == 2
    LikelihoodTask("likelihood/rows", [text("a", "yes")], EvalSettings(system="Be brief."))
