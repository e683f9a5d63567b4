"""Adapters of the whole service: they outlive reloads of the HTTP tier and the death of the engine."""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.service import Stream, Supervised, all_begun, http_client, is_there, settled, stream
from tests.models import CHAT_TEMPLATE
from tests.server.engine.adapters import write_folder
from tests.server.engine.backends.vllm_setup import VLLM, write_model_for_vllm
from tests.services import ROOT, clean_environment, wait_until

pytestmark = pytest.mark.e2e

NUM_ADAPTERS = 8
NUM_STREAMS = 16
Make = Callable[[Path, int], Path]


@pytest.mark.parametrize("num_reloads", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_they_outlive_reloads_and_the_engine_on_fake(serve: Serve, tmp_path: Path, num_reloads: int) -> None:
    service = serve(QLOOP_WORKERS="3", QLOOP_ADAPTER_ROOTS=str(tmp_path))
    survive(service, tmp_path, write_folder, num_reloads)


@pytest.mark.slow
def test_they_outlive_reloads_and_the_engine_on_hf(serve: Serve, tmp_path: Path, model_folder: Path) -> None:
    from tests.server.engine.backends.folders import write_adapter

    model = with_template(model_folder, tmp_path / "model")
    service = serve(QLOOP_WORKERS="3", QLOOP_ADAPTER_ROOTS=str(tmp_path), **hf(model))
    survive(service, tmp_path, lambda folder, seed: write_adapter(folder, model, seed=seed), 5)


@pytest.mark.parametrize("num_reloads", [pytest.param(5, marks=VLLM)])
@pytest.mark.timeout(900)
def test_they_outlive_reloads_and_the_engine_on_vllm(serve: Serve, tmp_path: Path, num_reloads: int) -> None:
    """And of vLLM's processes none outlives the engine."""
    from tests.server.engine.backends.folders import write_adapter

    model = write_model_for_vllm(tmp_path / "model", max_position_embeddings=8192)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    service = serve(
        QLOOP_WORKERS="3",
        QLOOP_ADAPTER_ROOTS=str(tmp_path),
        QLOOP_ENGINE="vllm",
        QLOOP_MODEL=str(model),
        QLOOP_VLLM_DTYPE="fp32",
        QLOOP_VLLM_ENFORCE_EAGER="true",
        QLOOP_KV_CACHE_GIB="0.1",
    )
    survive(service, tmp_path, lambda folder, seed: write_adapter(folder, model, seed=seed), num_reloads, 6000)


def survive(service: Supervised, root: Path, make: Make, num_reloads: int, num_tokens: int = 450) -> None:
    names = [f"a{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        body = {"name": name, "path": str(make(root / name, number))}
        assert httpx.post(service.url + "/v1/adapters", json=body, timeout=30).status_code == 200
    expected = asyncio.run(one_each(service, names))
    assert all(seen.is_whole for seen in expected.values())
    pid = service.engine_pid
    asyncio.run(reload_under_load(service, names, num_reloads))
    assert service.engine_pid == pid
    family = psutil.Process(pid).children(recursive=True)
    died = asyncio.run(kill_under_load(service, names, num_tokens))
    wait_until(lambda: not any(map(is_there, family)), 10, "the end of the old engine's processes")
    wait_until(
        lambda: service.status("/readyz") == 200 and service.engine_pid not in (None, pid),
        service.start_s,
        "a new engine",
    )
    first = asyncio.run(one_each(service, names[:1]))
    print(f"engine's death to the first answer: {time.monotonic() - died:.2f} s")
    assert first[names[0]].is_whole
    wait_until(lambda: service.all_ready, 60, "all workers")
    after = asyncio.run(one_each(service, names))
    assert {name: seen.text for name, seen in after.items()} == {name: seen.text for name, seen in expected.items()}
    states = httpx.get(service.url + "/v1/adapters").json()
    assert [card["state"] for card in states["data"]] == ["loaded"] * NUM_ADAPTERS


async def one_each(service: Supervised, names: list[str]) -> dict[str, Stream]:
    async with http_client() as client:
        seen = await asyncio.gather(*(stream(client, service.url, max_tokens=8, model=name) for name in names))
    return dict(zip(names, seen, strict=True))


async def reload_under_load(service: Supervised, names: list[str], times: int) -> None:
    """While as many streams as ever run on all of them; none may fail."""
    finished, models, seen = asyncio.Event(), itertools.cycle(names), []

    async def caller(client: httpx.AsyncClient) -> None:
        while not finished.is_set():
            seen.append(await stream(client, service.url, max_tokens=40, model=next(models)))

    async with http_client() as client:
        callers = [asyncio.create_task(caller(client)) for _ in range(NUM_STREAMS)]
        for _ in range(times):
            await all_begun(service, NUM_STREAMS // 2)
            await asyncio.to_thread(service.reload)
        finished.set()
        await asyncio.gather(*callers)
    assert len(seen) > NUM_STREAMS and [one for one in seen if not one.is_whole] == []


async def kill_under_load(service: Supervised, names: list[str], num_tokens: int) -> float:
    """Every stream ends with an error; when the engine died, by the clock."""
    models = itertools.cycle(names)
    async with http_client() as client:
        tasks = [
            asyncio.create_task(stream(client, service.url, max_tokens=num_tokens, model=next(models)))
            for _ in range(NUM_STREAMS)
        ]
        await all_begun(service, NUM_STREAMS)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        streams = await settled(tasks)
    assert [one for one in streams if one.error is None or one.is_done] == []
    return died


def test_what_the_trainer_publishes_is_served_within_two_seconds(
    serve: Serve, model_folder: Path, tmp_path: Path
) -> None:
    """By the command itself, in a process of its own, on weights that are real."""
    from tests.server.engine.backends.folders import write_adapter

    model = with_template(model_folder, tmp_path / "model")
    service = serve(**hf(model))
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"run{seed}", model, seed=seed)
        command = [
            "publish",
            str(folder),
            "--name",
            "news",
            "--base",
            str(model),
            "--home",
            str(service.home),
            "--force",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *command],
            env=clean_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        published = done.stdout.split()[1]
        wait_until(lambda wanted=published: root_of(service, "news") == wanted, 2.0, "the new revision")


def with_template(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return target


def hf(model: Path) -> dict[str, str]:
    return {
        "QLOOP_ENGINE": "hf",
        "QLOOP_MODEL": str(model),
        "QLOOP_NUM_THREADS": "1",
        "QLOOP_KV_CACHE_GIB": "0.1",
    }


def root_of(service: Supervised, model: str) -> str | None:
    root: str | None = httpx.get(service.url + f"/v1/models/{model}").json().get("root")
    return root
