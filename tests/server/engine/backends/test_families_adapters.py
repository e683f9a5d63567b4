"""Every adapter method of every family against PEFT one by one: each sequence with its own, all in one batch."""

import json

import pytest

from tests.server.engine.backends.families import FAMILIES
from tests.server.engine.backends.matrix import (
    BASE,
    PROMPTS,
    RESULTS,
    VARIANTS,
    FindSubject,
    Subject,
    every_method,
    finder,
    reuses_prefixes,
    second_turn,
    two_loras_and_base,
)
from tests.server.engine.backends.peft_adapters import METHODS


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> FindSubject:
    """Families by name, with all their adapters."""
    return finder(tmp_path_factory.mktemp)


def assert_adapters_matter(subject: Subject) -> None:
    plain = subject.reference(BASE, PROMPTS[0]).token_ids
    for method in subject.adapters:
        written = subject.reference(method, PROMPTS[0]).token_ids
        assert sum(a != b for a, b in zip(plain, written, strict=True)) >= len(plain) // 2, method
        assert len(set(written)) >= 6, method


def assert_refusals_are_documented(subject: Subject) -> None:
    cells = json.loads(RESULTS.read_text("utf-8"))["cells"][subject.family.name]
    tried = [*subject.adapters, *subject.refused]
    assert subject.refused.keys() == {method for method in tried if "peft_raised" in cells[method]}


@pytest.mark.parametrize("row", range(len(FAMILIES)), ids=list(FAMILIES))
def test_one_family_one_option_some_methods(tmp_path_factory: pytest.TempPathFactory, row: int) -> None:
    """The short tier's share: all families, options and methods occur, not all of their combinations."""
    family, variant = list(FAMILIES.values())[row], list(VARIANTS)[(row + 1) % len(VARIANTS)]
    methods = [list(METHODS)[(2 * row + i) % len(METHODS)] for i in range(3)]
    subject = Subject(family, tmp_path_factory.mktemp("family"), methods)
    assert_adapters_matter(subject)
    assert_refusals_are_documented(subject)
    with subject.backend(variant) as backend:
        every_method(backend, subject)
        second_turn(backend, subject, reuses_prefixes(variant))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_change_the_text(subject: FindSubject, family: str) -> None:
    assert_adapters_matter(subject(family))
    assert_refusals_are_documented(subject(family))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_agree(subject: FindSubject, family: str, variant: str) -> None:
    with subject(family).backend(variant) as backend:
        two_loras_and_base(backend, subject(family))
        every_method(backend, subject(family))
        second_turn(backend, subject(family), reuses_prefixes(variant))
