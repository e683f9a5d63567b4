"""Every family's greedy text against stock `generate`, whatever the batch around it does."""

import json

import pytest

from server.engine.backends.hf.fast import FastNetwork
from server.engine.backends.hf.generic import GenericNetwork
from tests.server.engine.backends.families import FAMILIES
from tests.server.engine.backends.matrix import (
    BASE,
    COLUMNS,
    NUM_TOKENS,
    PROMPTS,
    RESULTS,
    VARIANTS,
    FindSubject,
    base_alone,
    base_moving,
    finder,
    reuses_prefixes,
    second_turn,
)

OUR_FORWARD = ("qwen2", "qwen3", "llama", "mistral")  # what the backend computes without the model's own code


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> FindSubject:
    """Families by name, without adapters."""
    return finder(tmp_path_factory.mktemp, methods=())


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_texts_are_worth_comparing(subject: FindSubject, family: str) -> None:
    for prompt in PROMPTS:
        reference = subject(family).reference(BASE, prompt)
        assert len(set(reference.token_ids)) >= 8
        assert sum(gap > 1e-3 for gap in reference.gaps) >= NUM_TOKENS - 2


def test_the_published_table_has_these_families_methods_and_options() -> None:
    published = json.loads(RESULTS.read_text("utf-8"))
    assert list(published["cells"]) == list(FAMILIES)
    assert all(list(cells) == list(COLUMNS) for cells in published["cells"].values())
    assert published["variants"] == list(VARIANTS)


def cells() -> list[object]:
    """Every family with every variant; each family with one variant of its own is fast enough for each run."""
    return [
        pytest.param(family, variant, marks=() if row % len(VARIANTS) == column else pytest.mark.slow)
        for row, family in enumerate(FAMILIES)
        for column, variant in enumerate(VARIANTS)
    ]


@pytest.mark.parametrize(("family", "variant"), cells())
def test_base_agrees(subject: FindSubject, family: str, variant: str) -> None:
    is_ours = FAMILIES[family].config().model_type in OUR_FORWARD and "forward" not in VARIANTS[variant]
    with subject(family).backend(variant) as backend:
        assert isinstance(backend._network, FastNetwork if is_ours else GenericNetwork)
        base_alone(backend, subject(family))
        base_moving(backend, subject(family))
        second_turn(backend, subject(family), reuses_prefixes(variant))
