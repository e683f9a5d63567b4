"""HTTP clients for the shared services."""

from collections.abc import Iterator

import httpx
import pytest

from tests.services import Service


@pytest.fixture(scope="session")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client
