"""Documentation that fails the build when it lies."""

import re
from pathlib import Path

import pytest

from docs.generate import TABLES, generated
from server.app import create_app
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_the_generated_tables_are_what_the_code_says(page: Path) -> None:
    assert page.read_text("utf-8") == generated(page), "run: python -m docs.generate"


def test_every_setting_named_in_the_documentation_exists() -> None:
    known = {f"QLOOP_{name.upper()}" for name in Settings.model_fields} | {"QLOOP_CONFIG"}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*")]:
        if path.is_file():
            named = set(re.findall(r"\bQLOOP_[A-Z_]+[A-Z]\b", path.read_text("utf-8")))
            assert named <= known, f"{path.name} names {sorted(named - known)}"


def test_every_route_is_documented() -> None:
    readme = (ROOT / "README.md").read_text("utf-8") + (ROOT / "docs" / "operations.md").read_text("utf-8")
    for route in create_app(Settings()).routes:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", getattr(route, "path", ""))
        if not path.startswith("/static"):
            assert f"`{path}`" in readme, f"{path} is not documented"


def test_the_changelog_knows_this_version() -> None:
    import server

    assert f"## {server.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
