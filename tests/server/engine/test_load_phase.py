"""What is known of an engine before it answers."""

import os
import time
from pathlib import Path

import httpx
import pytest

from server.engine.load_phase import STALE_S, LoadReport, phase_path, read_phase
from tests.services import Service, wait_until


def test_phases_are_counted_and_gone_at_the_end(tmp_path: Path) -> None:
    path = phase_path(tmp_path / "run" / "engine.sock")
    assert read_phase(path) is None
    with pytest.raises(RuntimeError), LoadReport(path).loading() as report:
        report.enter("one")
        first = read_phase(path)
        report.enter("two")
        second = read_phase(path)
        raise RuntimeError
    assert first is not None and (first.phase, first.number, first.begun) == ("one", 1, first.entered)
    assert second is not None and (second.phase, second.number, second.begun) == ("two", 2, first.begun)
    assert read_phase(path) is None


def test_what_a_dead_engine_left_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "engine.loading"
    report = LoadReport(path)
    report.enter("one")
    long_ago = time.time() - STALE_S - 1
    os.utime(path, (long_ago, long_ago))
    assert read_phase(path) is None
    report.keep()
    assert read_phase(path) is not None
    path.write_text("damaged")
    assert read_phase(path) is None


@pytest.mark.e2e
def test_readyz_tells_how_far_a_load_is(model_folder: Path) -> None:
    service = Service(model_folder, 1, engine="hf", num_threads=1, kv_cache_gib=0.01)
    seen: list[dict[str, object]] = []

    def is_ready() -> bool:
        try:
            answer = httpx.get(service.url + "/readyz")
        except httpx.TransportError:
            return False  # Gunicorn is not there yet
        if "loading" in answer.json():
            assert answer.status_code == 503
            seen.append(answer.json()["loading"])
        return answer.status_code == 200

    try:
        wait_until(is_ready, service.start_s, "the engine")
        assert "loading" not in httpx.get(service.url + "/readyz").json()
        assert not phase_path(service.socket_path).exists()
    finally:
        service.stop()
    numbers = [one["number"] for one in seen]
    assert numbers == sorted(numbers) and len({one["phase"] for one in seen}) >= 2
    assert [one["load_s"] for one in seen] == sorted(one["load_s"] for one in seen)
