"""Text comes out of a token stream as soon as it is certain, and adds up to the whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hope_megatron.generation.text import TextStream


class Utf8Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, the hardest case: no token of a multi-byte character is text."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_join_to_the_text_and_are_never_broken_characters(text: str) -> None:
    stream = TextStream(Utf8Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""


def test_each_character_comes_out_with_its_last_byte() -> None:
    stream = TextStream(Utf8Bytes())
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]


def test_bytes_that_never_become_a_character_are_flushed() -> None:
    stream = TextStream(Utf8Bytes())
    assert stream.push("é".encode()[0]) == ""
    assert stream.flush() == "\ufffd"
