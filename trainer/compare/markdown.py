"""A comparison as report.md. Text of models and users is fenced or escaped, so that it stays text."""

import re
from collections.abc import Iterable, Iterator, Sequence

from trainer.compare.comparison import Comparison, TaskComparison
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

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~&-])")


def markdown(comparison: Comparison, words: Words) -> str:
    """The whole page."""
    blocks = [f"# {words('title')}", *_story(comparison, words)]
    blocks += [f"## {words('candidates')}", table(candidate_head(words), candidate_rows(comparison, words))]
    blocks += [f"## {words('scores')}", _scores(comparison, words)]
    for task in comparison.tasks:
        if task.subjects:
            blocks += [f"## {words('subjects')}: {plain(task.task)}", _subjects(task, comparison, words)]
            blocks += _published(task, words)
    blocks += _answers(comparison, words)
    blocks += [f"## {words('method')}", "\n".join(f"- {plain(line)}" for line in method(comparison, words))]
    blocks.append(plain(words("made", date=comparison.date, machine=comparison.machine)))
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _story(comparison: Comparison, words: Words) -> Iterator[str]:
    for number in range(1, len(comparison.candidates)):
        yield f"**{plain(headline(comparison, number, words))}**"
        yield "\n".join(f"- {plain(line)}" for line in sentences(comparison, number, words))


def _scores(comparison: Comparison, words: Words) -> str:
    lines = [line for task in comparison.tasks if task.passes for line in pass_lines(task, comparison, words)]
    text = table(score_head(words), score_rows(comparison, words))
    return text + "".join(f"\n\n{plain(line)}" for line in lines)


def _subjects(task: TaskComparison, comparison: Comparison, words: Words) -> str:
    head = [words("subject"), words("items"), *(one.name for one in comparison.candidates)]
    return table(head, subject_rows(task))


def _published(task: TaskComparison, words: Words) -> list[str]:
    if not is_mmcu(task.task):
        return []
    shown = table(published_head(words), published_rows())
    return [f"### {words('published')}", plain(words("published_note")), shown]


def _answers(comparison: Comparison, words: Words) -> Iterator[str]:
    if comparison.answers:
        yield f"## {words('answers')}"
    for row in comparison.answers:
        yield f"### {plain(row.task)}, {words(f'reason_{row.reason}')}: {plain(row.item_id)}"
        yield f"{words('question')}:\n\n{_fenced(row.prompt)}"
        if row.reference:
            yield f"{words('reference')}:\n\n{_fenced(row.reference)}"
        for candidate, answer, score in zip(comparison.candidates, row.answers, row.scores, strict=True):
            shown = "–" if score is None else f"{score:.3f}"
            text = f"\n\n{_fenced(answer or words('no_answer'))}" if any(row.answers) else ""
            yield f"{plain(candidate.name)} ({words('score')} {shown}){':' if text else ''}{text}"


def _fenced(text: str) -> str:
    """A fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines)
