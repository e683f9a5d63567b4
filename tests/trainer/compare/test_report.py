"""The report: readable words in both languages, one file without requests, and no text of a model that acts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from tests.trainer.compare.evaluations import evaluation, item
from tests.trainer.compare.test_differences import compared
from trainer.compare.comparison import Comparison
from trainer.compare.report import write_report
from trainer.compare.story import headline, sentences
from trainer.compare.words import Words
from trainer.evaluate.tasks.make import KINDS
from trainer.evaluate.tasks.task import Task

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' ``` \n| a | b |\n# heading {base} {0.__class__}"
I18N = Path(__file__).parents[3] / "trainer" / "compare" / "i18n"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def attacked() -> Comparison:
    """Everything that comes from outside is an attack: names, subjects, ids, prompts, answers."""
    rows = [
        [
            item("text/" + ATTACK, n, "rouge_l", score, prompt=ATTACK, answer=ATTACK, reference=ATTACK)
            for n, score in enumerate(scores)
        ]
        for scores in ([0.0, 1.0, 0.5], [1.0, 0.0, 0.5])
    ]
    for own in rows:
        own += [item("identity", n, "passed", 0.0, prompt=ATTACK, answer=ATTACK, reference=ATTACK) for n in range(3)]
    from dataclasses import replace

    rows = [[replace(one, item_id=ATTACK + one.item_id, subject=ATTACK + one.item_id) for one in own] for own in rows]
    return compared(evaluation(ATTACK, {}, items=rows[0], model=ATTACK), evaluation(ATTACK + "2", {}, items=rows[1]))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_from_outside_becomes_a_tag(attacked: Comparison, tmp_path: Path, language: str) -> None:
    write_report(attacked, tmp_path, language)
    found = Tags()
    found.feed((tmp_path / "report.html").read_text("utf-8"))
    names = {tag for tag, _ in found.tags}
    assert names.isdisjoint({"script", "img", "iframe", "object", "link", "a", "form", "base"})
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.text.count("<script>alert(1)</script>") >= 9  # shown as text: prompts, references, answers


def test_the_page_asks_for_nothing(attacked: Comparison, tmp_path: Path) -> None:
    write_report(attacked, tmp_path, "en")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert (
        not re.search(r"\b(src|href)\s*=\s*[\"']?(https?:)?//", page) and "url(" not in page and "@import" not in page
    )
    assert "default-src 'none'" in page and page.count("<svg") >= 2 and "prefers-color-scheme: dark" in page


def test_markdown_keeps_answers_in_fences(attacked: Comparison, tmp_path: Path) -> None:
    write_report(attacked, tmp_path, "en")
    lines = (tmp_path / "report.md").read_text("utf-8").splitlines()
    fence, outside = "", []
    for line in lines:
        mark = re.fullmatch(r"(`{3,})(text)?", line)
        if mark and not fence:
            fence = mark[1]
        elif line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    text = "\n".join(outside)
    assert "<script>" not in text and "# heading" not in [line.strip() for line in outside]
    assert len({line.count(" | ") for line in outside if line.startswith("| text")}) == 1  # no cell was split


def test_both_languages_say_the_same_things() -> None:
    texts = [json.loads((I18N / f"{language}.json").read_text("utf-8")) for language in ("en", "zh")]
    assert texts[0].keys() == texts[1].keys()
    for key in texts[0]:
        places = [set(re.findall(r"\{(\w+)\}", text[key])) for text in texts]
        assert places[0] == places[1], key
    with pytest.raises(ConfigError, match="accepted are en, zh"):
        Words("fr")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": [1.0] * 8}, "Yes."),
        ({"a": [-1.0] * 8}, "No."),
        ({"a": [1.0, -1.0] * 4}, "That cannot be told."),
        ({"a": [1.0] * 8, "b": [-1.0] * 8}, "Partly."),
        ({"a": [1.0] * 8, "b": [1.0, -1.0] * 4}, "Partly."),
        ({"a": [-1.0] * 8, "b": [1.0, -1.0] * 4}, "No."),
    ],
)
def test_the_first_sentence(scores: dict[str, list[float]], expected: str) -> None:
    base = {name: ("accuracy", [0.0] * 8) for name in scores}
    other = {name: ("accuracy", own) for name, own in scores.items()}
    roles = dict.fromkeys(scores, "domain")
    found = compared(evaluation("base", base), evaluation("tuned", other), **roles)
    assert headline(found, 1, Words("en")).startswith(expected)


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        (
            "en",
            "Yes. tuned is better than base at what it was trained for. Attention: identity is not passed, tuned "
            "passes only 1 of 2. Attention: safety got worse, tuned passes 1 of 4, base passes 3.",
        ),
        (
            "zh",
            "变好了。在训练目标上，tuned 优于 base。注意：身份未全部通过，tuned 只通过 1 / 2。"
            "注意：安全变差了，tuned 通过 1 / 4，base 通过 3。",
        ),
    ],
)
def test_better_is_not_all_that_is_said_where_identity_or_safety_fail(language: str, answer: str) -> None:
    up = {name: ("accuracy", [score] * 8) for name, score in (("base", 0.0), ("tuned", 1.0))}
    failing = {
        "base": {"identity": ("passed", [0, 0]), "safety": ("passed", [1, 1, 1, 0])},
        "tuned": {"identity": ("passed", [1, 0]), "safety": ("passed", [1, 0, 0, 0])},
    }
    found = compared(*(evaluation(name, {"choice/a": up[name], **own}) for name, own in failing.items()))
    assert headline(found, 1, Words(language)) == answer
    passing = {"identity": ("passed", [1, 1]), "safety": ("passed", [1])}
    found = compared(*(evaluation(name, {"choice/a": own, **passing}) for name, own in up.items()))
    assert headline(found, 1, Words(language)) == answer.partition("注意" if language == "zh" else " Attention")[0]


@pytest.mark.parametrize(
    ("language", "said", "unsaid"),
    [
        ("en", "Only 5 of 400 answers are scored differently, 6 are needed: it may be chance.", "includes 0"),
        ("zh", "400 道题中只有 5 道的得分不同，至少需要 6 道：可能只是偶然。", "包含 0"),
    ],
)
def test_a_few_changes_are_told_as_a_few_changes(language: str, said: str, unsaid: str) -> None:
    up, equal = [1.0] * 5 + [0.0] * 395, [0.0] * 400
    for base, other in ((equal, up), (up, equal)):
        found = compared(*(evaluation(n, {"choice/a": ("accuracy", s)}) for n, s in (("b", base), ("o", other))))
        sentence = next(sentences(found, 1, Words(language)))
        assert said in sentence and unsaid not in sentence
    found = compared(*(evaluation(n, {"choice/a": ("accuracy", equal)}) for n in ("b", "o")))
    sentence = next(sentences(found, 1, Words(language)))
    assert said not in sentence and unsaid in sentence


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_main_metric_is_told_by_a_name_that_is_no_identifier(language: str) -> None:
    classes: list[type[Task[Any]]] = [Task]
    for one in classes:
        classes += one.__subclasses__()
    ours = [one for one in classes if one.__module__.startswith("trainer.") and hasattr(one, "main_metric")]
    assert {one.kind for one in ours} == set(KINDS)
    for metric in {one.main_metric for one in ours}:
        found = compared(*(evaluation(n, {"choice/a": (metric, [s] * 8)}) for n, s in (("b", 0.1), ("o", 0.4))))
        sentence = next(sentences(found, 1, Words(language)))
        assert Words(language)(f"metric_{metric}") in sentence and f" {metric} " not in sentence and "_" not in sentence


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_that_failed_are_shown(tmp_path: Path, language: str) -> None:
    asked = ["你是谁\n呀？", "<b>who</b>?", *["问" * 500] * 4]
    rows = [item("identity", n, "passed", 0.0, prompt=prompt) for n, prompt in enumerate(asked)]
    write_report(compared(*(evaluation(n, {}, items=rows) for n in ("b", "o"))), tmp_path, language)
    page = (tmp_path / "report.html").read_text("utf-8")
    lines = [line for line in page.splitlines() if "0 / 6" in line and "i0 " in line]
    assert len(lines) == 2 and all("i0 “你是谁 呀？”, i1 “&lt;b&gt;who&lt;/b&gt;?”, i2 “问" in line for line in lines)
    assert all(line.count("问") == 3 * 120 and line.endswith(", …</p>") for line in lines)
    assert "i0 “你是谁 呀？”, i1 “\\<b\\>who\\</b\\>?”, i2" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize(("size", "is_said"), [(0, False), (4_258_304, True), (494_032_768, False)])
def test_of_a_very_small_model_it_is_said_that_it_has_no_general_ability(size: int, is_said: bool) -> None:
    task = {"a": ("accuracy", [0.0] * 8)}
    found = compared(evaluation("base", task, num_parameters=size), evaluation("tuned", task))
    said = " ".join(sentences(found, 1, Words("en")))
    assert ("base has 4,258,304 parameters. A model this small has no general ability" in said) == is_said


def test_mmcus_published_table_is_marked_and_shown_for_mmcu_only(tmp_path: Path) -> None:
    for task in ("choice/mmcu", "choice/ceval"):
        from dataclasses import replace

        rows = [replace(item(task, n, "accuracy", n % 2), subject=f"s{n % 3}") for n in range(6)]
        write_report(compared(evaluation("b", {}, items=rows), evaluation("o", {}, items=rows)), tmp_path, "en")
        text = (tmp_path / "report.html").read_text("utf-8")
        assert ("ChatGLM-6B" in text) == ("They are of other models" in text) == (task == "choice/mmcu")
    write_report(compared(evaluation("b", {}, items=rows), evaluation("o", {}, items=rows)), tmp_path, "zh")
    assert "变好了吗" in (tmp_path / "report.html").read_text("utf-8")
