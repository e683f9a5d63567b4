import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenize import Detokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


@pytest.fixture(scope="module")
def tokenizer(renderer):
    return renderer.tokenizer


def streamed(tokenizer, ids, skip=True):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


@given(ids=st.lists(st.integers(0, 504)), skip=st.booleans())
def test_joined_stream_equals_decode_for_any_ids(tokenizer, ids, skip):
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=TEXTS)
def test_valid_text_never_shows_a_replacement_character(tokenizer, text):
    deltas = streamed(tokenizer, tokenizer.encode_plain(text))
    assert not any("\ufffd" in delta for delta in deltas)


@given(text=TEXTS, data=st.data())
def test_a_stream_cut_anywhere_is_a_prefix_of_the_whole(tokenizer, text, data):
    ids = tokenizer.encode_plain(text)
    cut = data.draw(st.integers(0, len(ids)))
    assert tokenizer.decode(ids).startswith("".join(streamed(tokenizer, ids[:cut])))


def test_a_character_appears_once_its_last_byte_has_come(tokenizer):
    byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [byte_ids[bytes([byte])] for byte in "🙂a".encode()]
    assert streamed(tokenizer, ids) == ["", "", "", "🙂", "a", ""]
    assert streamed(tokenizer, ids[:3]) == ["", "", "", ""]


def test_special_tokens_are_skipped_inside_a_character_too(tokenizer):
    byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}
    first, *rest = (byte_ids[bytes([byte])] for byte in "好".encode())
    ids = [first, tokenizer.control_tokens["<|im_end|>"], *rest]
    assert "".join(streamed(tokenizer, ids)) == "好"
    assert "".join(streamed(tokenizer, ids, skip=False)).startswith("\ufffd<|im_end|>")


def test_added_tokens_not_flagged_special_are_text(tokenizer):
    assert streamed(tokenizer, [tokenizer.control_tokens["<tool_call>"]]) == ["<tool_call>", ""]


def test_padding_rows_of_an_embedding_add_nothing(tokenizer):
    ids = tokenizer.encode_plain("hello")
    assert "".join(streamed(tokenizer, [*ids, 151_900, *ids])) == "hellohello"
