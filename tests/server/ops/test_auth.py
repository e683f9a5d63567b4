"""API keys: every route but two asks for one, and no key means no address that others can reach."""

import base64
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from server.app import create_app
from server.errors import ConfigError
from server.ops.auth import OPEN_PATHS
from server.settings import Settings, load_settings
from tests.conftest import StartService
from tests.services import ROOT, Service, clean_environment

KEYS = ("first-key", "second=key:with/odd+signs")
ROUTES = sorted({route.path for route in create_app(Settings()).routes})  # type: ignore[attr-defined]
GUARDED = [path for path in ROUTES if path not in OPEN_PATHS]


@pytest.fixture(scope="module")
def guarded(start_session_service: StartService) -> Service:
    return start_session_service(api_keys=", ".join(KEYS))


@pytest.fixture(scope="module")
def caller(guarded: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url) as client:
        yield client


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


WRONG = {
    "none": None,
    "empty": "",
    "bearer alone": "Bearer",
    "another key": "Bearer wrong",
    "a beginning": "Bearer first-ke",
    "more than a key": "Bearer first-keyx",
    "both keys": "Bearer " + ",".join(KEYS),
    "another case": "Bearer FIRST-KEY",
    "no scheme": KEYS[0],
    "another scheme": f"Digest {KEYS[0]}",
    "basic, wrong": basic("wrong"),
    "basic, key as user": basic("", KEYS[0]),
    "basic, no base64": "Basic !!!",
    "basic, no colon": "Basic " + base64.b64encode(KEYS[0].encode()).decode(),
    "not ascii": "Bearer \xe9",
}
RIGHT = [f"Bearer {KEYS[0]}", f"Bearer {KEYS[1]}", f"bearer  {KEYS[0]}", basic(KEYS[0]), basic(KEYS[1])]


def call(caller: httpx.Client, path: str, authorization: str | None) -> httpx.Response:
    url = path.replace("{model_id:path}", "x/y").replace("{path:path}", "x.js")
    headers = {} if authorization is None else {b"Authorization": authorization.encode("latin-1")}
    return caller.get(url, headers=headers)  # POST routes answer it 405, once the key is right


def test_the_routes_are_those_we_think() -> None:
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/metrics", "/"} < set(
        GUARDED
    )
    assert set(OPEN_PATHS) == {"/livez", "/readyz"}


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG)
def test_without_a_right_key_everything_is_401(caller: httpx.Client, authorization: str | None) -> None:
    for path in [*GUARDED, "/unknown", "/livez/", "/x//livez", "/Livez", "/readyz/x"]:
        response = call(caller, path, authorization)
        assert response.status_code == 401, path
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert response.headers["www-authenticate"].startswith("Bearer") and response.headers["x-request-id"]


@pytest.mark.parametrize("authorization", RIGHT)
def test_a_right_key_opens_everything(caller: httpx.Client, authorization: str) -> None:
    for path in GUARDED:
        assert call(caller, path, authorization).status_code in (200, 404, 405), path


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_health_needs_no_key(caller: httpx.Client, path: str) -> None:
    assert call(caller, path, None).status_code == 200


def test_keys_and_prompts_never_reach_the_log(guarded: Service) -> None:
    body = {"messages": [{"role": "user", "content": "my-secret-prompt"}]}
    url = guarded.url + "/v1/chat/completions?token=in-the-query%0Aforged-line"
    assert httpx.post(url, json=body, headers={"Authorization": RIGHT[0]}).status_code == 200
    httpx.get(guarded.url + "/a%0Aforged-line", headers={"Authorization": "Bearer wrong-key-tried"})
    for text in (*KEYS, "my-secret-prompt", "in-the-query", "wrong-key-tried", "\nforged-line"):
        assert text not in guarded.log


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "127.example.com", ""])
def test_a_reachable_host_needs_a_key(host: str) -> None:
    given = {"host": host}
    with pytest.raises(ConfigError, match="QLOOP_API_KEYS"):
        load_settings(given)
    assert load_settings({**given, "api_keys": "k"}).settings.api_keys == ("k",)
    assert load_settings({**given, "allow_unauthenticated": "1"}).settings.allow_unauthenticated


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_none(host: str) -> None:
    assert load_settings({"host": host}).settings.is_loopback


@pytest.mark.parametrize("module", ["server", "server.engine"])
def test_the_process_refuses_to_start(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=clean_environment(QLOOP_HOST="0.0.0.0"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    assert "QLOOP_API_KEYS" in done.stderr and "QLOOP_ALLOW_UNAUTHENTICATED" in done.stderr
