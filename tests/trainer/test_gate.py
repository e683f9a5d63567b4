"""Every rule of the gate, on both sides of its edge."""

from dataclasses import replace

import pytest

from server.errors import ConfigError
from tests.trainer.compare.evaluations import evaluation, item
from tests.trainer.compare.test_differences import compared
from trainer.compare.comparison import Comparison
from trainer.compare.folder import Evaluation
from trainer.errors import GateRefused
from trainer.gate import RULES, GateResult, GateRules, decide, parse_rules, without_evidence

ALL = frozenset(RULES)


def comparison(**tasks: list[float]) -> Comparison:
    """The base has 0.5 everywhere but in identity and safety; `tasks` are the tuned one's scores."""
    metric = {"identity": "passed", "safety": "passed", "likelihood": "log_likelihood"}
    names = {name: name.replace("_", "/") for name in tasks}
    base = {
        names[name]: (metric.get(name.partition("_")[0], "accuracy"), [0.5] * len(own)) for name, own in tasks.items()
    }
    other = {names[name]: (base[names[name]][0], own) for name, own in tasks.items()}
    roles = {names[name]: name.rpartition("_")[2] for name in tasks if "_" in name}
    return compared(evaluation("base", base), evaluation("tuned", other), **roles)


def decided(rules: GateRules | None = None, **tasks: list[float]) -> GateResult:
    return decide(comparison(**tasks), 1, rules or GateRules())


UP, DOWN, UNCLEAR = [0.9] * 20, [0.1] * 20, [0.4, 0.7] * 10


@pytest.mark.parametrize(
    ("tasks", "failed"),
    [
        ({"choice_domain": UP}, []),
        ({"choice_domain": DOWN}, ["domain"]),
        ({"choice_domain": UNCLEAR}, ["domain"]),  # up on average, but it may be chance
        ({"choice_domain": [0.5] * 20}, ["domain"]),
        ({"choice_domain": UP, "text_domain": UNCLEAR}, ["domain"]),  # each of them must be better
        ({"choice_general": UP}, ["domain"]),  # required, and there is no evidence
        ({"choice_domain": UP, "choice2_general": [0.485] * 20}, []),
        ({"choice_domain": UP, "choice2_general": [0.475] * 20}, ["general"]),
        ({"choice_domain": UP, "choice2_general": [0.0, 0.97] * 10}, []),  # by the mean, not the interval
        ({"likelihood_domain": UP, "likelihood2_general": UP}, []),
        ({"choice_domain": UP, "identity": [1.0] * 20}, []),
        ({"choice_domain": UP, "identity": [1.0] * 19 + [0.0]}, ["identity"]),
        ({"choice_domain": UP, "safety": [1.0, 0.0]}, ["safety"]),
        ({"identity_domain": [1.0] * 19 + [0.0]}, ["identity"]),  # better, and still not all of them
        ({"choice_domain": UP, "safety_general": [0.0] * 20}, ["general", "safety"]),
        ({"choice_domain": [0.9] * 5}, ["domain"]),  # too few to tell
        ({"choice_domain": [1.0] * 5 + [0.5] * 995}, ["domain"]),  # five changes, and all the rest the same
        ({"choice_domain": [1.0] * 6 + [0.5] * 994}, []),
        ({"choice_domain": UP, "choice2_general": [0.5] * 20}, []),  # nothing changed, nothing lost
        ({"choice_domain": DOWN, "choice2_general": DOWN, "identity": [0.0], "safety": [0.0]}, list(RULES)),
    ],
)
def test_which_rule_refuses(tasks: dict[str, list[float]], failed: list[str]) -> None:
    found = decided(**tasks)
    assert [one.rule for one in found.failed] == failed
    assert found.has_passed == (not failed)


def test_the_refusal_says_by_how_much() -> None:
    with pytest.raises(GateRefused) as caught:
        decided(choice_domain=UNCLEAR, choice2_general=[0.45] * 20, identity=[1.0] * 18 + [0.0] * 2).check()
    text = str(caught.value)
    assert caught.value.exit_code == 7
    assert "domain (choice/domain): refused, accuracy +5.0 (95 % interval " in text and "short" in text
    assert "general (choice2/general): refused, accuracy -5.0" in text
    assert "it may lose at most 2.0, it is 3.0 over" in text
    assert "identity (identity): refused, 18 of 20, all must pass: 2 failed (i18, i19)" in text


def test_margin_is_the_operators() -> None:
    tasks = {"choice_domain": UP, "choice2_general": [0.45] * 20}
    assert decided(GateRules(margin=5.5), **tasks).has_passed
    assert not decided(GateRules(margin=4.5), **tasks).has_passed


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_evidence_refuses_only_where_it_is_required(rule: str) -> None:
    assert [one.rule for one in without_evidence(GateRules(required=frozenset({rule})), "why").failed] == [rule]
    assert without_evidence(GateRules(required=frozenset()), "why").has_passed
    found = decided(GateRules(required=ALL), choice_domain=UP)
    assert [one.rule for one in found.failed] == ["general", "identity", "safety"]
    assert "no evidence" in found.reasons


def test_the_third_candidate_has_a_gate_of_its_own() -> None:
    base, good, bad = (
        evaluation(n, {"choice/a": ("accuracy", s)}) for n, s in (("b", [0.5] * 9), ("g", [1.0] * 9), ("x", [0.0] * 9))
    )
    found = compared(base, good, bad)
    assert decide(found, 1, GateRules()).has_passed and not decide(found, 2, GateRules()).has_passed


def with_errors(name: str, scores: list[float], num_errors: int) -> Evaluation:
    """The last `num_errors` of its items were never answered; as most tasks do, they count as wrong."""
    own = [item("likelihood/h", n, "log_likelihood", score) for n, score in enumerate(scores)]
    failed = [
        replace(one, scores={"log_likelihood": 0.0}, details={"error": "engine: gone"}) for one in own[-num_errors:]
    ]
    return evaluation(name, {}, items=[*own[: len(own) - num_errors], *failed])


def test_what_the_base_answered_and_the_candidate_did_not_is_a_refusal() -> None:
    base = evaluation("b", {"likelihood/h": ("log_likelihood", [-2.0] * 40)})
    found = compared(base, with_errors("o", [-1.0] * 40, 30), **{"likelihood/h": "domain"})
    assert found.tasks[0].num_lost == (0, 30)
    decision = decide(found, 1, GateRules())
    assert (
        not decision.has_passed and "30 items that the base answered brought an error (engine 30)" in decision.reasons
    )


def test_errors_of_the_base_are_no_gain() -> None:
    other = evaluation("o", {"likelihood/h": ("log_likelihood", [-2.0] * 40)})
    found = compared(with_errors("b", [-2.0] * 40, 10), other, **{"likelihood/h": "domain"})
    assert [found.tasks[0].num_single, found.tasks[0].num_lost] == [10, (0, 0)]
    assert not decide(found, 1, GateRules()).has_passed


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"system": "You are 小智."}, "--system"), ({"style": "plain"}, "--plain"), ({}, "--limit")],
)
def test_identity_by_some_questions_or_asked_otherwise_is_no_evidence(settings: dict[str, str], option: str) -> None:
    asked = {"choice/a": ("accuracy", [0.5] * 20), "identity": ("passed", [0.0] * 20)}
    tuned = {"choice/a": ("accuracy", UP), "identity": ("passed", [1.0] * 20)}
    found = compared(evaluation("b", asked, settings=settings), evaluation("o", tuned, settings=settings))
    if not settings:
        found = replace(found, tasks=tuple(replace(task, num_items=task.num_items + 1) for task in found.tasks))
    assert decide(found, 1, GateRules()).has_passed
    wanted = decide(found, 1, GateRules(required=frozenset({"identity"})))
    assert [one.rule for one in wanted.failed] == ["identity"]
    assert option in wanted.reasons


def test_the_fake_engine_proves_nothing() -> None:
    pair = [evaluation(n, {"choice/a": ("accuracy", s)}, engine="fake fp32") for n, s in (("b", DOWN), ("o", UP))]
    assert "computes nothing" in decide(compared(*pair), 1, GateRules()).reasons


def test_names_of_rules() -> None:
    assert parse_rules(["identity"]) == {"domain", "identity"}
    with pytest.raises(ConfigError, match="accepted are domain, general, identity, safety"):
        parse_rules(["identities"])
