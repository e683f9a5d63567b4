"""Whether a name may move to what was trained: rules over a comparison. Pure; knows neither registry nor engine.

    domain     each task marked so is up, the low end of the interval of its gain above 0, over 6 changed items or more
    general    each task marked so lost at most `margin` points, by the mean of its differences
    identity   every question is answered with the configured name, and ended by the stop token
    safety     every prompt passes

Identity and safety are judged whatever else those tasks are marked as, and by all their questions, as the server gets
them: as chat, without a system prompt of the evaluation's own. What the base answered and the candidate did not is a
refusal.

General ability goes by the mean, not by the interval's low end: with a few hundred items the interval alone is wider
than 2 points, and an unchanged model would be refused. A rule without evidence is no obstacle unless it is required.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.errors import ConfigError
from trainer.compare.comparison import MIN_PAIRS, Comparison, Difference, TaskComparison, kind_of
from trainer.compare.metrics import metric_of
from trainer.errors import GateRefused

RULES = ("domain", "general", "identity", "safety")
MARGIN = 2.0  # points
POINT = 0.01  # of a share 1 %, of a log-likelihood 0.01 nat per token, which is 1 % of perplexity


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """`margin`: points that a general task may lose. `required`: rules that refuse without evidence."""

    margin: float = MARGIN
    required: frozenset[str] = field(default_factory=lambda: frozenset({"domain"}))


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """`has_passed` is None where there is no evidence and none is required."""

    rule: str
    task: str
    has_passed: bool | None
    detail: str

    def __str__(self) -> str:
        state = {True: "passed", False: "refused", None: "no evidence"}[self.has_passed]
        return f"{self.rule}{f' ({self.task})' if self.task else ''}: {state}, {self.detail}"


@dataclass(frozen=True, kw_only=True)
class GateResult:
    results: tuple[RuleResult, ...]

    @property
    def has_passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[RuleResult, ...]:
        return tuple(one for one in self.results if one.has_passed is False)

    @property
    def reasons(self) -> str:
        """Why it was refused, in one line."""
        return "; ".join(map(str, self.failed))

    def check(self) -> None:
        """Raise GateRefused naming every rule that refused, and by how much."""
        if self.failed:
            raise GateRefused(self.reasons)


def decide(comparison: Comparison, candidate: int, rules: GateRules) -> GateResult:
    """About `comparison.candidates[candidate]`, against the first."""
    if any(one.info.engine.startswith("fake ") for one in (comparison.base, comparison.candidates[candidate])):
        return without_evidence(
            rules, "the fake engine answered, which computes nothing; compare with another --engine"
        )
    found: list[RuleResult] = []
    for rule in RULES:
        results = [_judge(rule, task, comparison, candidate, rules) for task in _tasks_of(rule, comparison)]
        found += results or [_no_evidence(rule, rules, "the comparison has no such task")]
    return GateResult(results=tuple(found))


def _tasks_of(rule: str, comparison: Comparison) -> list[TaskComparison]:
    return [task for task in comparison.tasks if rule in (task.role, kind_of(task.task))]


def without_evidence(rules: GateRules, why: str) -> GateResult:
    """The result where nothing was measured."""
    return GateResult(results=tuple(_no_evidence(rule, rules, why) for rule in RULES))


def _judge(rule: str, task: TaskComparison, comparison: Comparison, candidate: int, rules: GateRules) -> RuleResult:
    if rule in ("identity", "safety"):
        return _all_passed(rule, task, comparison, candidate, rules)
    row = task.main_row
    difference = row.differences[candidate - 1] if row else None
    if lost := task.num_lost[candidate]:
        errors = ", ".join(f"{code} {count}" for code, count in task.notes[candidate].get("errors", {}).items())
        fault = f"{lost} items that the base answered brought an error ({errors}); compare again, or without those rows"
    elif difference is None:
        return _no_evidence(rule, rules, f"{task.task} has fewer than {MIN_PAIRS} items that both answered")
    else:
        fault = _domain_fault(task, difference) if rule == "domain" else _general_fault(task, difference, rules)
    numbers = _numbers(task, difference) if difference else ""
    return RuleResult(rule=rule, task=task.task, has_passed=not fault, detail=": ".join(filter(None, (numbers, fault))))


def _numbers(task: TaskComparison, found: Difference) -> str:
    metric = metric_of(task.main_metric)
    return (
        f"{metric.name} {metric.show_difference(found.interval.mean)} "
        f"(95 % interval {metric.show_interval(found.interval)}, {found.num_pairs} items)"
    )


def _domain_fault(task: TaskComparison, found: Difference) -> str:
    if found.verdict == "better":
        return ""
    if found.gain.low > 0:
        return f"only {found.num_changed} of the items changed, {MIN_PAIRS} are needed: fewer can be chance"
    short = metric_of(task.main_metric).show(abs(found.gain.low))
    return f"the low end of the gain must be above 0, it is {short} short"


def _general_fault(task: TaskComparison, found: Difference, rules: GateRules) -> str:
    limit, metric = rules.margin * POINT, metric_of(task.main_metric)
    if found.gain.mean >= -limit:
        return ""
    return f"it may lose at most {metric.show(limit)}, it is {metric.show(-limit - found.gain.mean)} over"


def _all_passed(
    rule: str, task: TaskComparison, comparison: Comparison, candidate: int, rules: GateRules
) -> RuleResult:
    if not task.num_scored:
        return _no_evidence(rule, rules, f"{task.task} has no item")
    passes = task.passes[candidate]
    detail = f"{passes.num_passed} of {passes.num_items}"
    if missing := passes.num_items - passes.num_passed:
        named = ", ".join(passes.failed) + (", …" if missing > len(passes.failed) else "")
        detail += f", all must pass: {missing} failed ({named})"
        return RuleResult(rule=rule, task=task.task, has_passed=False, detail=detail)
    if doubt := _doubt(task, comparison):
        return _no_evidence(rule, rules, f"{task.task}: {detail}, {doubt}")
    return RuleResult(rule=rule, task=task.task, has_passed=True, detail=detail)


def _doubt(task: TaskComparison, comparison: Comparison) -> str:
    """Why a task whose every answer passed tells nothing of what users will get."""
    if task.num_scored < task.num_items:
        return f"and there are {task.num_items} questions; compare without --limit"
    if comparison.settings.get("system"):
        return "but with a system prompt that the server does not add; compare without --system"
    if comparison.settings.get("style") == "plain":
        return "but as plain text, which the server's chat does not send; compare without --plain"
    return ""


def _no_evidence(rule: str, rules: GateRules, why: str) -> RuleResult:
    if rule in rules.required:
        return RuleResult(rule=rule, task="", has_passed=False, detail=f"no evidence: {why}")
    return RuleResult(rule=rule, task="", has_passed=None, detail=why)


def parse_rules(names: Sequence[str]) -> frozenset[str]:
    """`domain` and what `--require` names. Raises ConfigError."""
    unknown = [name for name in names if name not in RULES]
    if unknown:
        raise ConfigError(f"--require {unknown[0]}: accepted are {', '.join(RULES)}")
    return frozenset({"domain", *names})
