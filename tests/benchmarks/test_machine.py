"""What a result says of the machine that it was measured on."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, memory_estimate


def test_the_system_is_told_without_the_machines_own_words() -> None:
    told = machine.describe()["machine"]["system"]
    assert re.fullmatch(rf"{platform.system()} \d+\.\d+ {platform.machine()}", told)


def test_no_kept_result_names_a_machine() -> None:
    kept = [json.loads(path.read_text("utf-8"))["machine"]["system"] for path in machine.RESULTS.glob("*.json")]
    assert kept and all(re.fullmatch(r"\w+ \d+\.\d+ \w+", system) for system in kept)


def test_the_load_is_that_before_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = [0.0]

    def run(*_: Any) -> dict[str, Any]:
        load[0] += 1
        return {"combination": "one", "estimated": 1, "measured": 1, "off": 0.0}

    monkeypatch.setattr("os.getloadavg", lambda: (load[0],) * 3)
    monkeypatch.setattr(memory_estimate, "run", run)
    monkeypatch.setattr(memory_estimate, "write_model", lambda *_: tmp_path)
    output = tmp_path / "result.json"
    assert memory_estimate.main(["--only", "0", "1", "--work", str(tmp_path), "--output", str(output)]) == 0
    assert json.loads(output.read_text("utf-8"))["machine"]["load_average_before"] == [0.0] * 3
