"""Behaviour: the estimate is within 15 % of what a real run takes. Qwen2-0.5B's shape, a process each.

A part of `python -m benchmarks.memory_estimate`, which has 16 combinations: whole weights, LoRA in both types, QLoRA.
"""

from pathlib import Path

import pytest

from benchmarks.memory_estimate import COMBINATIONS, MOST_OFF, run, write_model

CHOSEN = (2, 5, 8, 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("half") / "model", None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", CHOSEN, ids=lambda number: f"{COMBINATIONS[number][0]}-{number}")
def test_the_estimate_is_near_the_measured_peak(number: int, model: Path, tmp_path: Path) -> None:
    row = run(number, model, tmp_path, threads=1)
    assert abs(row["off"]) <= MOST_OFF, row
