"""Every method on every family: trained, saved, loaded again, served. The diagonal in each run, the rest is slow."""

import json
from collections.abc import Callable

import pytest

from tests.trainer.families import FAMILIES
from tests.trainer.method_matrix import METHODS, RESULTS, Cell, Subject

FindSubject = Callable[[str], Subject]
FAST = ("Qwen2", "GLM", "GPT-2", "OPT", "remote code")
PUBLISHED = json.loads(RESULTS.read_text("utf-8"))["cells"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> FindSubject:
    built: dict[str, Subject] = {}

    def find(name: str) -> Subject:
        if name not in built:
            built[name] = Subject(FAMILIES[name], tmp_path_factory.mktemp("family"))
        return built[name]

    return find


def test_the_published_table_has_these_families_and_methods() -> None:
    assert list(PUBLISHED) == list(FAMILIES)
    assert all(list(cells) == list(METHODS) for cells in PUBLISHED.values())


def assert_as_published(cell: Cell, method: str, published: dict[str, object]) -> None:
    assert (list(cell.engines), cell.refused) == (published["engines"], published["refused"])
    # LLM.int8 rounds the activations of a batch by what else is in it, padding included.
    allowed = 5e-3 if method == "QLoRA int8" else 1e-5
    assert cell.refused or (cell.num_compared > 0 and cell.reload_gap < allowed)


def cells() -> list[object]:
    """Each method once, on families that differ most; the others are slow."""
    rows = [row for row, family in enumerate(FAMILIES) if family in FAST]
    fast = {(rows[column % len(rows)], column) for column in range(len(METHODS))}
    return [
        pytest.param(family, method, marks=() if (row, column) in fast else pytest.mark.slow)
        for row, family in enumerate(FAMILIES)
        for column, method in enumerate(METHODS)
    ]


@pytest.mark.parametrize(("family", "method"), cells())
def test_what_is_trained_is_saved_loaded_and_served(subject: FindSubject, family: str, method: str) -> None:
    assert_as_published(subject(family).cell(method), method, PUBLISHED[family][method])
