import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.store.names import MAX_NAME_LENGTH, ModelId, NameRefused, check_name, parse_model_id


@pytest.mark.parametrize("name", ["a", "qwen2-demo", "Qwen2.5-7B_v1", "team:model", "0", "a" * MAX_NAME_LENGTH])
def test_usable_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        "a/b",
        "/a",
        "a\\b",
        "-a",
        ".a",
        "_a",
        ":a",
        "a:",
        "a.",
        "小智",
        "a b",
        "a\n",
        "a\0b",
        "a@b",
        "a" * (MAX_NAME_LENGTH + 1),
    ],
)
def test_unusable_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(NameRefused, match="letters, digits"):
        check_name(name)


@given(st.text())
def test_a_name_that_passes_is_one_path_part(name: str) -> None:
    try:
        check_name(name)
    except NameRefused:
        return
    assert "/" not in name and name not in (".", "..") and name.isascii() and not name.startswith(".")


def test_model_ids_are_a_name_or_a_name_and_revision() -> None:
    assert parse_model_id("xiaozhi") == ModelId("xiaozhi")
    assert parse_model_id("xiaozhi@0123456789ab") == ModelId("xiaozhi", "0123456789ab")
    assert str(parse_model_id("xiaozhi@0123456789ab")) == "xiaozhi@0123456789ab"


@pytest.mark.parametrize(
    "text", ["xiaozhi@", "xiaozhi@latest", "xiaozhi@0123456789AB", "@0123456789ab", "a@b@c", "a@../.."]
)
def test_malformed_model_ids_are_refused(text: str) -> None:
    with pytest.raises(NameRefused):
        parse_model_id(text)
