"""Imports go one way, workers stay light, and one module reads the environment."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import ROOT, clean_environment

PACKAGES = ("server", "trainer", "webchat")
HEAVY = ("torch", "transformers", "vllm", "peft", "bitsandbytes", "accelerate", "numpy", "trl")
# What of the server the trainer may use: text, folders, the client; and settings' helper for the home, errors, logging.
TRAINER_MAY = ("server.text", "server.store", "server.engine.client", "server.engine.messages")
TRAINER_MAY_TOO = ("server.errors", "server.settings", "server.__version__", "server.ops.logging")
# They pass the environment on to children or set a variable for a library; they read no setting.
ENVIRONMENT = {
    "server/settings.py",
    "server/ops/logging.py",  # sets TOKENIZERS_PARALLELISM
}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of everything a file imports, at its top or inside functions: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def violations(package: str, forbidden: tuple[str, ...], allowed_in: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules(package)
        if not path.relative_to(ROOT).as_posix().startswith(allowed_in or ("-",))
        for name, line in imported(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


def test_webchat_imports_nothing_of_ours() -> None:
    ours = [v for v in violations("webchat", PACKAGES) if ": webchat" not in v]
    assert ours == []


def test_server_never_imports_trainer() -> None:
    assert violations("server", ("trainer",)) == []


def test_only_app_knows_the_pages() -> None:
    assert violations("server", ("webchat",), ("server/app.py",)) == []


def test_trainer_uses_only_what_it_may() -> None:
    allowed = TRAINER_MAY + TRAINER_MAY_TOO
    wrong = [
        violation
        for violation in violations("trainer", ("server",))
        if not violation.rpartition(": ")[2].startswith(allowed) and not violation.endswith(": server")
    ]
    assert wrong == []


def test_only_backends_import_heavy_libraries() -> None:
    assert violations("server", HEAVY, ("server/engine/backends/",)) == []
    assert violations("webchat", HEAVY) == []


def test_messages_are_the_bottom_layer() -> None:
    for name, below in {
        "server/engine/messages.py": (),
        "server/engine/transport.py": ("server.engine.messages",),
        "server/errors.py": (),
        "server/text/tokenizer.py": ("server.text", "server.errors"),
        "server/engine/client.py": ("server.engine.messages", "server.engine.transport", "server.errors"),
    }.items():
        ours = [module for module, _ in imported(ROOT / name) if module.startswith(PACKAGES)]
        assert [module for module in ours if not module.startswith(below or ("-",))] == [], name


@pytest.mark.parametrize("layer", ["server/text", "server/store"])
def test_text_and_store_know_no_http_and_no_engine(layer: str) -> None:
    assert violations(layer, ("server.api", "server.app", "server.engine", "server.ops", "starlette")) == []


def test_the_engine_knows_no_http() -> None:
    assert violations("server/engine", ("server.api", "server.app", "starlette", "uvicorn", "gunicorn")) == []


@pytest.mark.parametrize("package", ["server", "webchat"])
def test_only_settings_touches_the_environment(package: str) -> None:
    for path in modules(package):
        names = {f"{n.value.id}.{n.attr}" for n in ast.walk(ast.parse(path.read_text("utf-8"))) if _is_name_attr(n)}  # type: ignore[attr-defined]
        touches = names & {"os.environ", "os.getenv", "os.environb", "os.putenv"}
        assert not touches or path.relative_to(ROOT).as_posix() in ENVIRONMENT, path


def _is_name_attr(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


LIGHT = {
    "server.app": (*HEAVY, "trainer"),
    "server.__main__": (*HEAVY, "trainer"),
    "server.engine.client": (*HEAVY, "trainer", "starlette", "webchat", "tokenizers"),
    "server.engine.__main__": (*HEAVY, "trainer", "starlette", "webchat"),
    "server.text.render": (*HEAVY, "trainer", "starlette"),
    "server.store.registry": (*HEAVY, "trainer", "starlette"),
    "webchat.app": (*HEAVY, "trainer", "server"),
}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_nothing_heavy(module: str) -> None:
    """In a fresh interpreter, what is loaded in truth, through whatever third party."""
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()).isdisjoint(LIGHT[module])


def test_the_scan_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import torch.nn\nfrom server import errors\ndef f():\n    import trainer as t\n")
    assert [name for name, _ in imported(file)] == ["torch.nn", "server.errors", "trainer"]
