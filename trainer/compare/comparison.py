"""What a comparison found, as data: report.json is this, the pages show it, the gate decides by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from server.errors import ConfigError
from server.store.hashes import file_hash
from server.store.model_folder import read_json_object
from trainer.evaluate.results import CandidateInfo, Interval

COMPARISON_FORMAT = 2
REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
MIN_PAIRS = 6  # of fewer not even all wins are more than chance: a sign test of 5 has p = 2 / 32
Role = Literal["domain", "general", "identity", "safety", "other"]
ROLES: tuple[Role, ...] = ("domain", "general", "identity", "safety", "other")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Who was compared; the first of a comparison is the base."""

    info: CandidateInfo
    items_hash: str = ""  # sha256 of its items.jsonl
    machine: str = ""
    date: str = ""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def revision(self) -> str:
        """Of its adapter, 12 hex digits; "" for a whole model, and for a URL that does not say."""
        return self.info.adapter.partition("@")[2]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`candidate - base` of one metric, over MIN_PAIRS or more items that both answered, and its 95 % interval."""

    interval: Change
    p: float  # two-sided: how often chance alone makes a difference this large
    num_pairs: int
    num_changed: int  # of them, those that the two answered with a different score
    direction: int  # 1: more is better, -1: less is, 0: neither

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the whole interval is on one side of 0 and MIN_PAIRS or more items changed, else
        `unclear`: of a few changes among many equal items the bootstrap is too sure."""
        gain = self.gain
        if not self.direction:
            return "neutral"
        if self.num_changed < MIN_PAIRS:
            return "unclear"
        return "better" if gain.low > 0 else "worse" if gain.high < 0 else "unclear"

    @property
    def gain(self) -> Change:
        """The difference turned so that more is better."""
        one = self.interval
        return Change(mean=-one.mean, low=-one.high, high=-one.low) if self.direction < 0 else one


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric; one value per candidate, one difference per candidate after the base (None: too few pairs)."""

    metric: str
    values: tuple[Interval | None, ...]
    differences: tuple[Difference | None, ...]


@dataclass(frozen=True, kw_only=True)
class SubjectRow:
    """The task's main metric in one subject, per candidate."""

    subject: str
    num_items: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Of a task where each item passes or fails. `failed`: ids of the first that failed; `questions`: what those asked,
    shortened."""

    num_passed: int
    num_items: int
    failed: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """One question and every candidate's answer. `reason`: `loss`, `gain` or `random`."""

    task: str
    item_id: str
    reason: str
    prompt: str
    reference: str
    answers: tuple[str, ...]
    scores: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """`passes`, `notes` and `num_lost` have an entry per candidate; `passes` only where each item passes or fails:
    identity and safety. `num_lost`: items that have the main metric for the base, and for that candidate have not."""

    task: str
    role: Role
    main_metric: str
    num_items: int
    num_scored: int
    num_single: int  # items with the main metric for the base or for another candidate, not for both
    refused: Mapping[str, int]
    rows: tuple[MetricRow, ...]
    subjects: tuple[SubjectRow, ...] = ()
    passes: tuple[Passes, ...] = ()
    notes: tuple[Mapping[str, Any], ...] = ()
    num_lost: tuple[int, ...] = ()

    def row(self, metric: str) -> MetricRow | None:
        return next((row for row in self.rows if row.metric == metric), None)

    @property
    def main_row(self) -> MetricRow | None:
        return self.row(self.main_metric)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidates, the base first, and what became of each task."""

    candidates: tuple[Candidate, ...]
    tasks: tuple[TaskComparison, ...]
    answers: tuple[SideBySide, ...]
    date: str
    machine: str
    versions: Mapping[str, str]
    seed: int
    settings: Mapping[str, Any]
    num_resamples: int = 0
    format_version: int = COMPARISON_FORMAT

    @property
    def base(self) -> Candidate:
        return self.candidates[0]

    def of_role(self, role: Role) -> tuple[TaskComparison, ...]:
        return tuple(task for task in self.tasks if task.role == role)


def kind_of(task: str) -> str:
    """`choice` of `choice/mmcu`."""
    return task.partition("/")[0]


def read_comparison(folder: Path) -> tuple[Comparison, str]:
    """The comparison in a compare folder (or its report.json), and that file's sha256. Raises ConfigError."""
    path = folder / REPORT_JSON if folder.is_dir() else folder
    if not path.is_file():
        raise ConfigError(f"{folder}: no {REPORT_JSON}; name the folder that `python -m trainer compare` wrote")
    value = read_json_object(path)
    if value.get("format_version") != COMPARISON_FORMAT:
        raise ConfigError(f"{path}: format_version {value.get('format_version')!r}; compare again with this release")
    try:
        return msgspec.convert(value, Comparison), file_hash(path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
