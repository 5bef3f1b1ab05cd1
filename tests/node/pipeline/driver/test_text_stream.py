"""What a stream shows: whole characters, no stop string, whatever the borders of the tokens."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.pipeline.driver.text_stream import TextStream
from protocol.errors import InvalidParamsError


def shown(pieces: list[bytes], stop: list[str]) -> tuple[str, bool]:
    stream = TextStream(stop)
    text = "".join(stream.feed(piece) for piece in pieces) + stream.finish()
    return text, stream.stopped


def expected(text: str, stop: list[str]) -> tuple[str, bool]:
    """The rule spelt out: the first stop string to be complete, of those the longest, ends the text."""
    for end in range(1, len(text) + 1):
        starts = [end - len(word) for word in stop if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)], True
    return text, False


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    places = sorted({min(border, len(data)) for border in borders} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


borders = st.lists(st.integers(0, 60), max_size=30)


@given(st.text(max_size=30), borders)
def test_characters_are_never_broken(text: str, places: list[int]) -> None:
    stream = TextStream()
    so_far = ""
    for piece in cut(text.encode(), places):
        so_far += stream.feed(piece)
        assert text.startswith(so_far)
    assert so_far + stream.finish() == text


@given(
    st.text("abé漢", max_size=20),
    borders,
    st.lists(st.text("abé漢", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_end_the_text_wherever_the_borders_lie(text: str, places: list[int], stop: list[str]) -> None:
    assert shown(cut(text.encode(), places), stop) == expected(text, stop)


@given(st.text("ab", max_size=20), borders, st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_shown_is_taken_back(text: str, places: list[int], stop: list[str]) -> None:
    stream = TextStream(stop)
    final = expected(text, stop)[0]
    so_far = ""
    for piece in cut(text.encode(), places):
        so_far += stream.feed(piece)
        assert final.startswith(so_far)


@given(st.binary(max_size=40), borders)
def test_any_bytes_are_text_in_the_end(data: bytes, places: list[int]) -> None:
    assert shown(cut(data, places), [])[0] == data.decode(errors="replace")


def test_text_is_held_only_while_a_stop_string_is_possible() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"so E") == "so "
    assert stream.feed(b"N") == ""
    assert stream.feed(b"T") == "ENT"
    assert stream.feed(b"END of it") == ""
    assert stream.stopped
    assert stream.feed(b"more") == ""
    assert stream.finish() == ""


def test_the_stop_string_that_is_complete_first_wins_and_then_the_longest() -> None:
    assert shown([b"xabc"], ["abc", "b"]) == ("xa", True)
    assert shown([b"xabc"], ["c", "abc", "bc"]) == ("x", True)


def test_an_unfinished_character_and_a_half_stop_string_come_out_at_the_end() -> None:
    assert shown([b"a\xe6\xbc", b"E"], ["END"]) == ("a\ufffdE", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="empty"):
        TextStream(["a", ""])
