"""For every test of the estimate."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The check says nothing when its estimate fails, and then seems to pass every run. Who expects that clears it."""
    with caplog.at_level(logging.INFO, logger="qloop.estimate"):
        yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "qloop.estimate"] == []
