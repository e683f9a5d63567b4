"""Settings: five layers in order, errors that name variable, value and source, secrets masked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.engine.backends import create_backend
from server.errors import ConfigError
from server.settings import Settings, environment_for_children, load_settings
from tests.services import ROOT, clean_environment


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No settings from the developer's own environment; a folder without .env."""
    for name in [name for name in os.environ if name.startswith("QLOOP_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_layer_beats_the_next(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (load_settings().settings.port, load_settings().sources["port"]) == (8000, "default")
    config = bare / "qloop.toml"
    config.write_text("port = 1001\nworkers = 7\n")
    given: dict[str, Any] = {"config": str(config)}
    assert (load_settings(given).settings.port, load_settings(given).sources["port"]) == (1001, str(config))
    (bare / ".env").write_text("QLOOP_PORT=1002\nUNRELATED=1\n")
    assert (load_settings(given).settings.port, load_settings(given).sources["port"]) == (1002, ".env")
    monkeypatch.setenv("QLOOP_PORT", "1003")
    assert (load_settings(given).settings.port, load_settings(given).sources["port"]) == (1003, "environment")
    given["port"] = "1004"
    assert (load_settings(given).settings.port, load_settings(given).sources["port"]) == (1004, "command line")
    assert load_settings(given).settings.workers == 7  # layers mix, value by value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'port = 1001\napi_keys = ["a", "b"]\nserved_model_name = "名"'),
        ("c.yaml", "port: 1001\napi_keys: [a, b]\nserved_model_name: 名\nmodel:\n"),
        ("c.yml", "port: '1001'\napi_keys: a, b\nserved_model_name: 名\n"),
        ("c.json", '{"port": 1001, "api_keys": ["a", "b"], "served_model_name": "名", "model": null}'),
    ],
)
def test_config_files(bare: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / name).write_text(text, encoding="utf-8")
    settings = load_settings({"config": name}).settings
    assert (settings.port, settings.api_keys, settings.served_model_name) == (1001, ("a", "b"), "名")
    (bare / ".env").write_text(f"QLOOP_CONFIG={name}\n")
    assert load_settings().settings == settings
    (bare / ".env").write_text("QLOOP_CONFIG=/nowhere\n")
    monkeypatch.setenv("QLOOP_CONFIG", name)
    assert load_settings().settings == settings


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "port = = 1", "does not parse.*line 1"),
        ("c.yaml", "port: [1", "does not parse.*line"),
        ("c.json", '{"port": 1', "does not parse.*column"),
        ("c.json", "[1]", "must hold a mapping"),
        ("c.yaml", "prot: 1", "'prot' is not a setting; did you mean port"),
        ("c.toml", 'port = "high"', "QLOOP_PORT='high' .*c.toml"),
        ("c.json", '{"workers": 0}', "QLOOP_WORKERS=0 .*greater than or equal to 1"),
        ("c.yaml", "\xff", "does not parse"),
    ],
)
def test_bad_config_files(bare: Path, name: str, text: str, message: str) -> None:
    (bare / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_settings({"config": name})


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_config_file_that_cannot_be_read(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({"config": name})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "0"),
        ("port", "65536"),
        ("port", "eighty"),
        ("workers", "-1"),
        ("engine", "vulkan"),
        ("hf_dtype", "int4"),
        ("hf_forward", "fast"),
        ("prefix_cache", "perhaps"),
        ("unknown_params", "maybe"),
        ("max_body_mib", "0"),
        ("max_queue", "-1"),
        ("heartbeat_timeout_s", "0.5"),
        ("allow_unauthenticated", "perhaps"),
        ("log_level", "loud"),
        ("max_model_len", "1"),
    ],
)
def test_errors_name_variable_value_and_source(field: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"QLOOP_{field.upper()}", value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert f"QLOOP_{field.upper()}={value!r} (from environment)" in str(caught.value)
    monkeypatch.delenv(f"QLOOP_{field.upper()}")
    with pytest.raises(ConfigError, match="from command line"):
        load_settings({field: value})


def test_a_bad_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLOOP_API_KEYS", "geheim-ключ")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "QLOOP_API_KEYS" in str(caught.value) and "geheim" not in str(caught.value)


def test_unknown_names(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray variable is only warned of, as others may have set it; our own files must be right."""
    monkeypatch.setenv("QLOOP_PROT", "1")
    assert load_settings().warnings == ["QLOOP_PROT is not a setting; did you mean QLOOP_PORT?"]
    (bare / ".env").write_text("QLOOP_PROT=1\n")
    with pytest.raises(ConfigError, match=r"\.env: QLOOP_PROT is not a setting; did you mean QLOOP_PORT\?"):
        load_settings()


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLOOP_MODEL", "")
    monkeypatch.setenv("QLOOP_PORT", "")
    assert (load_settings().settings.model, load_settings().settings.port) == (None, 8000)


def test_keys_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLOOP_API_KEYS", " one, two ,,three")
    assert load_settings().settings.api_keys == ("one", "two", "three")


def test_the_hf_engine_gets_its_settings(fake_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.backends.hf.HfBackend", lambda options: options)
    given = {"engine": "hf", "model": str(fake_model)}
    options: Any = create_backend(load_settings(given).settings)
    assert (options.dtype, options.forward, options.prefix_cache) == ("auto", "auto", True)
    given |= {"hf_dtype": "bnb-int8", "hf_forward": "generic", "prefix_cache": "false"}
    options = create_backend(load_settings(given).settings)
    assert (options.dtype, options.forward, options.prefix_cache) == ("bnb-int8", "generic", False)


def test_paths_are_absolute(bare: Path) -> None:
    settings = load_settings({"home": "h", "engine_socket": "s.sock"}).settings
    assert (settings.home, settings.socket_path) == (bare / "h", bare / "s.sock")
    assert load_settings({"home": "~/h"}).settings.home == Path.home() / "h"


def test_a_socket_path_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="QLOOP_ENGINE_SOCKET"):
        load_settings({"home": "/tmp/" + "x" * 100})
    with pytest.raises(ConfigError, match="107 bytes"):
        load_settings({"home": "/tmp/" + "名" * 31})  # bytes count, not characters
    assert load_settings({"home": "/tmp/" + "x" * 100, "engine_socket": "/tmp/q.sock"})


def test_children_see_the_command_line(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bare / "c.json"
    config.write_text('{"workers": 5}')
    monkeypatch.setenv("QLOOP_PORT", "1003")
    arguments = {"port": "1004", "config": "c.json", "host": None}
    here = load_settings(arguments).settings
    for name, value in environment_for_children(arguments).items():
        monkeypatch.setenv(name, value)
    (bare / "elsewhere").mkdir()
    monkeypatch.chdir(bare / "elsewhere")
    there = load_settings().settings
    assert (here.port, here.workers, here.host) == (there.port, there.workers, there.host) == (1004, 5, "127.0.0.1")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    environment = clean_environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_print_config_shows_each_value_with_its_source() -> None:
    done = run("--print-config", "--port", "1004", QLOOP_API_KEYS="geheim-1,geheim-2", QLOOP_WORKERS="3")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0 and set(rows) == {f"QLOOP_{name.upper()}" for name in Settings.model_fields}
    assert rows["QLOOP_PORT"].split()[1:] == ["1004", "command", "line"]
    assert rows["QLOOP_WORKERS"].split()[1:] == ["3", "environment"]
    assert rows["QLOOP_HOST"].split()[1:] == [json.dumps("127.0.0.1"), "default"]
    assert "(2 hidden)" in rows["QLOOP_API_KEYS"] and "geheim" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--port", "eighty"], {}, "QLOOP_PORT='eighty' (from command line)"),
        (["serve"], {"QLOOP_ENGINE": "vulkan"}, "QLOOP_ENGINE='vulkan' (from environment)"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml cannot be read"),
        (["reload"], {"QLOOP_HOME": "/tmp/qloop-nobody"}, "No supervisor runs"),
    ],
)
def test_a_wrong_setting_ends_with_78(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = run(*arguments, **variables)
    assert done.returncode == 78 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run("--prot", "1").returncode == 2
