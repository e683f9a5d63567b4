"""What an evaluation leaves: one folder, `result.json` written last and `items.jsonl` as it goes.

Knows neither how items are asked nor how they are scored.
"""

from dataclasses import dataclass, field
from typing import Any

# Errors that come again however often an item is asked, or are not the candidate's: such an item is done with.
LASTING = frozenset(("context_length_exceeded", "no-tokens", "not-a-number", "gold-timeout", "gold-crash"))
NOT_THE_CANDIDATES = frozenset(("gold-timeout", "gold-crash"))


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """One item as one candidate answered it. A line of items.jsonl."""

    item_id: str
    task: str  # "choice/mmcu", "text/cmb", "likelihood/held_out", "sql/spider_dk", "identity", "safety", "bbh/…"
    subject: str
    scores: dict[str, float]  # by metric, higher is better except perplexity and lengths
    prompt: str = ""  # what a reader of the report should see: the last user message or the question
    answer: str = ""
    reference: str = ""
    details: dict[str, Any] = field(default_factory=dict)  # finish_reason, letter logprobs, num_tokens, error …

    @property
    def error_code(self) -> str:
        """Why it could not be asked or scored; "" where it was."""
        return str(self.details["error"]).partition(":")[0][:60] if "error" in self.details else ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over items and its 95 % bootstrap interval; `low` and `high` are None for one item, which tells nothing of
    others."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SubjectScore:
    subject: str
    num_items: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    task: str
    main_metric: str  # the key of `metrics` that stands for the task
    metrics: dict[str, Interval]
    subjects: tuple[SubjectScore, ...]
    num_items: int  # read from the files
    num_scored: int
    num_examples: int
    refused: dict[str, int]  # by code
    notes: dict[str, Any] = field(default_factory=dict)  # position bias, few-shot count, tokenisation, smoothing …


@dataclass(frozen=True, kw_only=True)
class CandidateInfo:
    """Who was evaluated."""

    name: str  # as the user named it
    kind: str  # "engine" or "url"
    model: str
    adapter: str = ""  # name@revision
    engine: str = ""  # backend and dtype
    fingerprint: str = ""  # hash of base weights, adapter revision, engine, template; "" for a URL that gives none
    sampling: dict[str, float] = field(default_factory=dict)  # of its generation_config.json; written answers follow it
    num_parameters: int = 0  # of the base; 0: not known


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    candidate: CandidateInfo
    tasks: tuple[TaskResult, ...]
    date: str  # ISO 8601, UTC
    machine: str
    versions: dict[str, str]
    seed: int
    settings: dict[str, Any]  # shots, how letters are scored, max_tokens …
    speed: dict[str, float] = field(default_factory=dict)  # items_per_s, tokens_per_s, seconds
    format_version: int = 1
