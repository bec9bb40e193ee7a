"""JSON arrays read an element at a time: what a whole parse finds, in bounded memory."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.json_values import IncompleteJsonError, json_values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


class Dripping(io.RawIOBase):
    """A stream that gives a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = io.BytesIO(data), step

    def read(self, size: int = -1) -> bytes:
        return self._data.read(self._step)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(JSON.filter(lambda value: not isinstance(value, list)), max_size=5),
    indent=st.none() | st.integers(0, 3),
    step=st.integers(1, 9),
    ascii_=st.booleans(),
)
def test_array_elements_are_those_of_a_whole_parse(
    values: list[Any], indent: int | None, step: int, ascii_: bool
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_).encode("utf-8", "surrogatepass")
    found = [json.loads(value or b"") for value in json_values(Dripping(data, step), 1 << 20)]  # type: ignore[arg-type]
    assert found == json.loads(data)
    if len(data) > 1:
        with pytest.raises(IncompleteJsonError):
            list(json_values(Dripping(data[:-1], step), 1 << 20))  # type: ignore[arg-type]


def test_long_elements_are_passed_over_within_bounded_memory() -> None:
    data = b'[{"text": "' + b"x" * 5000 + b'"}, {"text": "short"}, ' + b'{"a": 1}]'
    assert list(json_values(io.BytesIO(data), 100)) == [None, b'{"text": "short"}', b'{"a": 1}']
