"""Who may call the operator's routes, what they refuse, and vLLM's own two."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.store.registry import AdapterEntry, Registry
from tests.conftest import StartService
from tests.server.api.near import near_server
from tests.server.engine.adapters import write_folder
from tests.services import MODEL, Service

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
CALLS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "list": ("GET", "/v1/adapters", None),
    "load": ("POST", "/v1/adapters", {"name": "x"}),
    "unload": ("DELETE", "/v1/adapters/x", None),
    "promote": ("POST", "/v1/adapters/x/promote", {"revision": "0" * 12}),
    "rollback": ("POST", "/v1/adapters/x/rollback", {}),
    "vllm load": ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}),
    "vllm unload": ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}),
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def statuses(client: httpx.AsyncClient, headers: dict[str, str]) -> set[int]:
    answers = [await client.request(m, path, json=body, headers=headers) for m, path, body in CALLS.values()]
    return {answer.status_code for answer in answers}


ALLOWED = {200, 400, 404}


@pytest.fixture
async def keys(fake_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with near_server(fake_model, api_keys=("user",), admin_keys=("boss",)) as (_, client):
        yield client


async def test_with_admin_keys_only_they_make_an_operator(keys: httpx.AsyncClient) -> None:
    assert await statuses(keys, bearer("user")) == {403}
    assert await statuses(keys, {}) == await statuses(keys, bearer("wrong")) == {401}
    assert await statuses(keys, bearer("boss")) <= ALLOWED
    for key in ("user", "boss"):
        assert (await keys.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_without_admin_keys_api_keys_do(fake_model: Path) -> None:
    async with near_server(fake_model, api_keys=("user",)) as (_, client):
        assert await statuses(client, bearer("user")) <= ALLOWED and await statuses(client, {}) == {401}


async def test_with_admin_keys_alone_the_rest_stays_open(fake_model: Path) -> None:
    async with near_server(fake_model, admin_keys=("boss",)) as (_, client):
        assert await statuses(client, {}) == await statuses(client, bearer("wrong")) == {401}
        assert await statuses(client, bearer("boss")) <= ALLOWED
        assert (await client.get("/v1/models")).status_code == 200


async def test_without_keys_loopback_decides(fake_model: Path) -> None:
    async with near_server(fake_model) as (_, client):
        assert await statuses(client, {}) <= ALLOWED
    async with near_server(fake_model, host="0.0.0.0", allow_unauthenticated=True) as (_, client):
        assert await statuses(client, {}) == {403}
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_foreign_page_cannot_make_a_browser_call_them(fake_model: Path) -> None:
    """A form or a script on another site may send these content types without asking first."""
    async with near_server(fake_model) as (_, client):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            for _, path, _ in (call for call in CALLS.values() if call[0] == "POST"):
                answer = await client.post(path, content=b'{"name": "x"}', headers={"Content-Type": kind})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Content-Type")


WRONG: dict[str, tuple[str, str, dict[str, Any] | None, int, str]] = {
    "no name": ("POST", "/v1/adapters", {}, 400, "name"),
    "a bad name": ("POST", "/v1/adapters", {"name": "../x"}, 400, "name"),
    "a bad revision": ("POST", "/v1/adapters", {"name": "x@y"}, 400, "name"),
    "an unknown field": ("POST", "/v1/adapters", {"name": "x", "folder": "/x"}, 400, "folder"),
    "a pin that is no bool": ("POST", "/v1/adapters", {"name": "x", "pinned": "yes"}, 400, "pinned"),
    "a revision and a path": ("POST", "/v1/adapters", {"name": "x@" + "0" * 12, "path": "/x"}, 400, "name"),
    "promote without a path": ("POST", "/v1/adapters", {"name": "x", "promote": True}, 400, "promote"),
    "a path without roots": ("POST", "/v1/adapters", {"name": "x", "path": "/x"}, 400, "path"),
    "the base's name": ("POST", "/v1/adapters", {"name": "base", "path": "/x"}, 400, "name"),
    "an unknown adapter": ("POST", "/v1/adapters", {"name": "x"}, 404, ""),
    "an unknown mode": ("DELETE", "/v1/adapters/x?mode=kill", None, 400, "mode"),
    "unload of an unknown one": ("DELETE", "/v1/adapters/x", None, 404, ""),
    "unload of a bad name": ("DELETE", "/v1/adapters/x@1", None, 400, "adapter_id"),
    "promote without a revision": ("POST", "/v1/adapters/x/promote", {}, 400, "revision"),
    "promote to a bad revision": ("POST", "/v1/adapters/x/promote", {"revision": "1"}, 400, "revision"),
    "promote an unknown one": ("POST", "/v1/adapters/x/promote", {"revision": "0" * 12}, 404, ""),
    "promote a revision": ("POST", f"/v1/adapters/x@{'0' * 12}/promote", {"revision": "0" * 12}, 400, "name"),
    "roll back an unknown one": ("POST", "/v1/adapters/x/rollback", {}, 404, "name"),
    "no lora_path": ("POST", "/v1/load_lora_adapter", {"lora_name": "x"}, 400, "lora_path"),
    "a revision for vLLM's load": (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": "x@" + "0" * 12, "lora_path": "/x"},
        400,
        "lora_name",
    ),
    "fused experts": (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": "x", "lora_path": "/x", "is_3d_lora_weight": True},
        400,
        "is_3d_lora_weight",
    ),
    "no lora_name": ("POST", "/v1/unload_lora_adapter", {}, 400, "lora_name"),
    "an unknown lora": ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}, 404, ""),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_wrong_is_named(fake_model: Path, case: str) -> None:
    method, path, body, status, param = WRONG[case]
    async with near_server(fake_model) as (backend, client):
        if case == "the base's name":
            body = {"name": backend.model.name.replace("/", "-"), "path": "/x"}
            param = "path"  # its slash is no name at all here, so what is refused next is the path
        answer = await client.request(method, path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"] or "") == (status, param), error


async def test_an_adapter_that_cannot_be_read_is_refused_by_name(fake_model: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # a file whose first byte is an I/O error
    async with near_server(fake_model, adapter_roots=(tmp_path, Path("/proc"))) as (_, client):
        answer = await client.post("/v1/adapters", json={"name": "x", "path": str(folder)})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_adapter") and "cannot be read" in error["message"]


async def test_a_rollback_that_somebody_overtook_is_a_conflict(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback = Registry.rollback

    def after_another(self: Registry, name: str, revision: str) -> AdapterEntry:
        rollback(self, name, revision)
        return rollback(self, name, revision)

    monkeypatch.setattr(Registry, "rollback", after_another)
    async with near_server(fake_model, adapter_roots=(tmp_path,)) as (_, client):
        for seed in (1, 2):
            load = {"name": "x", "path": str(write_folder(tmp_path / str(seed), seed))}
            assert (await client.post("/v1/adapters", json=load)).status_code == 200
        answer = await client.post("/v1/adapters/x/rollback", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "adapter_moved") and "somebody else" in error["message"]


# --- vLLM's own routes ---


@pytest.fixture
def vllm_like(start_service: StartService, tmp_path: Path) -> Iterator[tuple[Service, httpx.Client, Path]]:
    root = tmp_path / "root"
    root.mkdir()
    service = start_service(workers=2, adapter_roots=root)
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield service, client, root


def test_vllms_clients_work_unchanged(vllm_like: tuple[Service, httpx.Client, Path]) -> None:
    _, client, root = vllm_like
    load = {"lora_name": "sql", "lora_path": str(write_folder(root / "sql", 1))}
    question = {"model": "sql", "prompt": "a b c d e f g h i j k l", "max_tokens": 5}
    answer = client.post("/v1/load_lora_adapter", json=load)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    texts = [client.post(COMPLETIONS, json=question).json()]
    again = client.post("/v1/load_lora_adapter", json=load)
    assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
    write_folder(root / "sql", 2)
    assert client.post("/v1/load_lora_adapter", json={**load, "load_inplace": True}).status_code == 200
    models = [model for model in client.get("/v1/models").json()["data"] if model["id"] == "sql"]
    assert len(models) == 1 and models[0]["parent"] == MODEL
    texts.append(client.post(COMPLETIONS, json=question).json())
    assert texts[0]["choices"][0]["text"] != texts[1]["choices"][0]["text"]
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "sql", "lora_int_id": 1})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 404
    assert client.post(COMPLETIONS, json={"model": "sql", "prompt": "a"}).status_code == 404


def test_what_the_gate_refused_is_promoted_only_with_a_reason(
    vllm_like: tuple[Service, httpx.Client, Path],
) -> None:
    service, client, root = vllm_like
    cards = [
        client.post("/v1/adapters", json={"name": "g", "path": str(write_folder(root / f"g{i}", i))}).json()
        for i in (1, 2)
    ]
    refused = cards[0]["revision"]
    registry = Registry(service.home / "adapters")
    registry.annotate("g", refused, scores={}, report_hash="", gate="refused", gate_reason="domain: -0.1")
    no = client.post("/v1/adapters/g/promote", json={"revision": refused})
    assert (no.status_code, no.json()["error"]["code"]) == (409, "not_proved") and "domain: -0.1" in no.text
    assert client.get("/v1/models/g").json()["root"] == cards[1]["id"]
    yes = client.post("/v1/adapters/g/promote", json={"revision": refused, "force": "a trial"})
    assert yes.status_code == 200 and client.get("/v1/models/g").json()["root"] == cards[0]["id"]
    assert registry.get("g", refused).card.gate_reason == "a trial; domain: -0.1"


def test_rollback_and_pins_over_http(vllm_like: tuple[Service, httpx.Client, Path]) -> None:
    _, client, root = vllm_like
    cards = [
        client.post("/v1/adapters", json={"name": "a", "path": str(write_folder(root / str(i), i))}).json()
        for i in (1, 2)
    ]
    quiet = client.post(
        "/v1/adapters", json={"name": "a", "path": str(write_folder(root / "3", 3)), "promote": False}
    ).json()
    assert not quiet["current"] and client.get("/v1/models/a").json()["root"] == cards[1]["id"]
    back = client.post("/v1/adapters/a/rollback", json={}).json()
    assert back["id"] == cards[0]["id"]
    nothing = client.post("/v1/adapters/a/rollback", json={})
    assert nothing.status_code == 404 and "no earlier revision" in nothing.json()["error"]["message"]
    for pinned in (True, False):
        assert client.post("/v1/adapters", json={"name": "a", "pinned": pinned}).json()["pinned"] is pinned
    listed = client.get("/v1/adapters").json()
    assert (listed["object"], listed["max_loaded"], listed["num_loaded"]) == ("list", 8, 3)
    row = listed["data"][0]
    assert set(row) >= {"id", "name", "revision", "state", "current", "pinned", "method", "rank", "base", "created"}
    assert client.delete(f"/v1/adapters/{quiet['id']}").json()["revisions"] == [quiet["revision"]]
    assert client.get(f"/v1/models/{quiet['id']}").status_code == 404
