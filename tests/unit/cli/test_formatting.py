"""Numbers as people read them."""

from __future__ import annotations

import pytest

from hope_megatron.cli.formatting import bytes_text, count_text, duration_text, percent_text


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
    ("seconds", "text"), [(5, "5 s"), (59.9, "60 s"), (300, "5 min"), (9000, "2 h 30 min"), (864_000, "10.0 days")]
)
def test_duration(seconds, text):
    assert duration_text(seconds) == text


def test_percent():
    assert percent_text(0.1234) == "12.3 %"
