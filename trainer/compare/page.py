"""A comparison as report.html: one file, no script, no request. Every text from outside is escaped."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from trainer.compare.comparison import Comparison, SideBySide, TaskComparison
from trainer.compare.metrics import metric_of
from trainer.compare.plots import differences_plot, scores_plot, subjects_plot
from trainer.compare.published import is_mmcu
from trainer.compare.story import headline, method, sentences
from trainer.compare.tables import (
    candidate_head,
    candidate_rows,
    pass_lines,
    published_head,
    published_rows,
    score_head,
    score_rows,
    subject_rows,
)
from trainer.compare.words import Words

STYLE = Path(__file__).with_name("page.css")
MAX_PLOTTED_SUBJECTS = 40
# Nothing may be loaded or run, whatever an answer holds: the second lock after escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HTML_LANGUAGE = {"en": "en", "zh": "zh-CN"}


def page(comparison: Comparison, words: Words) -> str:
    """The whole file."""
    title = escape(words("title"))
    body = "".join(_body(comparison, words))
    return (
        f'<!doctype html>\n<html lang="{HTML_LANGUAGE[words.language]}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def _body(comparison: Comparison, words: Words) -> Iterator[str]:
    for number in range(1, len(comparison.candidates)):
        yield _story(comparison, number, words)
    yield _heading(words("candidates")) + _table(candidate_head(words), candidate_rows(comparison, words))
    yield _heading(words("scores"))
    yield _table(score_head(words), score_rows(comparison, words), numbers_from=3)
    lines = [line for task in comparison.tasks if task.passes for line in pass_lines(task, comparison, words)]
    yield "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    yield from _plots(comparison, words)
    for task in comparison.tasks:
        if task.subjects:
            yield from _subjects(task, comparison, words)
    if comparison.answers:
        yield _heading(words("answers"))
        yield from (_answer(row, comparison, words) for row in comparison.answers)
    yield _heading(words("method")) + _list(method(comparison, words))
    facts = {words("settings"): comparison.settings, words("versions"): comparison.versions}
    for name, values in facts.items():
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        yield f"<p class=fine>{escape(name)}: {escape(shown)}</p>\n"
    yield f"<p class=fine>{escape(words('made', date=comparison.date, machine=comparison.machine))}</p>\n"


def _story(comparison: Comparison, number: int, words: Words) -> str:
    names = {"base": comparison.base.name, "other": comparison.candidates[number].name}
    return (
        f"<section class=story><p class=fine>{escape(words('subtitle', **names))}</p>\n"
        f"<p class=headline>{escape(headline(comparison, number, words))}</p>\n"
        f"{_list(sentences(comparison, number, words))}</section>\n"
    )


def _plots(comparison: Comparison, words: Words) -> Iterator[str]:
    drawn = [("plot_differences", differences_plot(comparison)), ("plot_scores", scores_plot(comparison))]
    if any(svg for _, svg in drawn):
        yield _heading(words("plots"))
    for key, svg in drawn:
        if svg:
            yield f"<figure>{svg}<figcaption>{escape(words(key))}</figcaption></figure>\n"


def _subjects(task: TaskComparison, comparison: Comparison, words: Words) -> Iterator[str]:
    names = [one.name for one in comparison.candidates]
    yield _heading(f"{words('subjects')}: {task.task}")
    if metric_of(task.main_metric).scale == "share":
        rows = [(row.subject, row.values) for row in task.subjects[:MAX_PLOTTED_SUBJECTS]]
        yield f"<figure>{subjects_plot(names, rows)}<figcaption>{_legend(names)}</figcaption></figure>\n"
    yield _table([words("subject"), words("items"), *names], subject_rows(task), numbers_from=1)
    if is_mmcu(task.task):
        yield f"<h3>{escape(words('published'))}</h3><p class=fine>{escape(words('published_note'))}</p>\n"
        yield _table(published_head(words), published_rows(), numbers_from=1)


def _legend(names: Sequence[str]) -> str:
    return " ".join(f'<span class="key c{n % 4}"></span>{escape(name)}' for n, name in enumerate(names))


def _answer(row: SideBySide, comparison: Comparison, words: Words) -> str:
    cells = "".join(
        f"<div><h4>{escape(one.name)} <small>{escape(words('score'))} "
        f"{'–' if score is None else format(score, '.3f')}</small></h4>"
        + (f"<pre>{escape(answer or words('no_answer'))}</pre></div>" if any(row.answers) else "</div>")
        for one, answer, score in zip(comparison.candidates, row.answers, row.scores, strict=True)
    )
    reference = f"<h4>{escape(words('reference'))}</h4><pre>{escape(row.reference)}</pre>" if row.reference else ""
    return (
        f'<article class="{row.reason}"><h3>{escape(words(f"reason_{row.reason}"))} <small>{escape(row.task)}, '
        f"{escape(row.item_id)}</small></h3><h4>{escape(words('question'))}</h4><pre>{escape(row.prompt)}</pre>"
        f"{reference}<div class=sides>{cells}</div></article>\n"
    )


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>\n"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None = None) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if numbers_from is None or place < numbers_from else " class=number" for place in range(len(cells))]
        return "<tr>" + "".join(
            f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True)
        ) + "</tr>\n"  # fmt: skip

    body = "".join(line(row, "td") for row in rows)
    return f"<div class=wide><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table></div>\n"
