"""Numbers as people read them."""

from __future__ import annotations

import pytest

from hope_megatron.runtime.formatting import bytes_text, count_text, duration_text, percent_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23K"), (764_096_640, "764M"), (3e10, "30G"), (1.2e18, "1,200P")],
)
def test_count(value, text):
    assert count_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 B"), (8e10, "80.0 GB"), (1.5e12, "1.5 TB")])
def test_bytes(value, text):
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.3, "<1s"), (0.6, "1s"), (59.6, "1m 00s"), (125, "2m 05s"), (9000, "2h 30m"), (187_200, "2d 04h")],
)
def test_duration(seconds, text):
    assert duration_text(seconds) == text


def test_percent():
    assert percent_text(0.1234) == "12.3 %"
