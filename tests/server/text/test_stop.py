import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import StopStrings

LETTERS = st.text("ab好", max_size=30)
STOPS = st.lists(st.text("ab好", min_size=1, max_size=5), max_size=4)


def reference(text, stops, include):
    """The whole-text rule: the first to be complete wins, the longest of several complete at the same character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(chunks, stops, include=False):
    stop_strings = StopStrings(stops, include)
    shown = [stop_strings.feed(chunk) for chunk in chunks]
    return [*shown, stop_strings.flush()], stop_strings.matched


@given(chunks=st.lists(LETTERS, max_size=12), stops=STOPS, include=st.booleans())
def test_any_cutting_into_chunks_equals_the_whole_text_reference(chunks, stops, include):
    shown, matched = run(chunks, stops, include)
    assert ("".join(shown), matched) == reference("".join(chunks), stops, include)


@given(text=LETTERS, stops=STOPS)
def test_only_what_could_begin_a_stop_string_is_held_back(text, stops):
    stop_strings = StopStrings(stops)
    shown = stop_strings.feed(text)
    if stop_strings.matched is None:
        held = text[len(shown) :]
        assert held == max(
            (text[n:] for n in range(len(text) + 1) if any(s.startswith(text[n:]) for s in stops)), key=len, default=""
        )


def test_a_stop_string_split_over_chunks_never_shows():
    assert run(["Hi <", "|us", "er", "|> more"], ["<|user|>"]) == (["Hi ", "", "", "", ""], "<|user|>")


def test_a_false_start_is_released():
    assert run(["a#", "#b", "#"], ["###"]) == (["a", "##b", "", "#"], None)


def test_include_shows_the_stop_string():
    assert run(["a", "bEN", "Dc"], ["END"], include=True) == (["a", "b", "END", ""], "END")


def test_nothing_shows_after_a_match():
    assert run(["x!", "y", "!"], ["!"]) == (["x", "", "", ""], "!")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
