"""Whether a model says who it is: the configured name, nobody else's, and then it stops."""

import functools
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

QUESTIONS: Final = Path(__file__).parent / "identity_questions.json"
_HAN: Final = r"\u3400-\u9fff"


@dataclass(frozen=True, kw_only=True)
class IdentityQuestion:
    question_id: str
    language: Literal["zh", "en"]
    text: str


@dataclass(frozen=True, kw_only=True)
class IdentityScore:
    """`failed` has the rules that an answer breaks: no-name, foreign-name, not-stopped."""

    failed: tuple[str, ...]
    foreign: tuple[str, ...]  # the names found that are not ours

    @property
    def passed(self) -> bool:
        return not self.failed


@functools.cache
def identity_questions() -> tuple[IdentityQuestion, ...]:
    """Twenty ways to ask, ten Chinese and ten English. None names another model, so that no right answer has to."""
    return tuple(IdentityQuestion(**question) for question in _data()["questions"])


def identity_score(answer: str, name: str, finish_reason: str, *, author: str = "") -> IdentityScore:
    """Judges one answer. Case, width and spaces do not count; where a name begins or ends in Latin letters it must
    stand alone there (Al is not in Also).

    A foreign name counts even where it is denied ("I am not …"). Names that the configured name or author contains
    are not foreign. Raises ValueError for an empty name.
    """
    if not _bare(name):
        raise ValueError("an identity check needs the configured name")
    text = _bare(answer)
    foreign = tuple(
        other
        for other in _data()["foreign_names"]
        if _has(text, other) and not _has(_bare(name), other) and not _has(_bare(author), other)
    )
    rules = {"no-name": not _has(text, name), "foreign-name": bool(foreign), "not-stopped": finish_reason != "stop"}
    return IdentityScore(failed=tuple(rule for rule, is_broken in rules.items() if is_broken), foreign=foreign)


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(QUESTIONS.read_text("utf-8"))
    return data


def _bare(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _has(text: str, name: str) -> bool:
    return _pattern(name).search(text.replace("-", " ")) is not None


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    """A digit may follow: Qwen2, GPT4. Spaces inside, and between Chinese and Latin, may be missing or more; only a
    Latin end must stand alone, as Chinese has no spaces between words (小智AI助手)."""
    bare = _bare(name)
    parts = re.split(rf"[\s\-]+|(?<=[{_HAN}])(?=[a-z0-9])|(?<=[a-z0-9])(?=[{_HAN}])", bare)
    begin = r"(?<![a-z0-9])" if re.match("[a-z0-9]", bare) else ""
    end = "(?![a-z])" if re.search("[a-z0-9]$", bare) else ""
    return re.compile(begin + r"\s*".join(map(re.escape, parts)) + end)
