"""The YAML dialect: YAML 1.2 where people stumble over 1.1, and nothing silently dropped."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.config import ConfigError
from hope_megatron.config.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("1e3x", "1e3x"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("[1, 2e-4]", [1, 2e-4]),
        ("base: &b {x: 1}\nmore: {<<: *b, y: 2}", {"base": {"x": 1}, "more": {"x": 1, "y": 2}}),
    ],
)
def test_scalars(text, value):
    assert parse_yaml(text, "test") == value
    assert type(parse_yaml(text, "test")) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: key 'c' is given twice"),
        ("1: x", "key 1 is not a name"),
        ("a: .nan", "not a finite number"),
        ("a: -.inf", "not a finite number"),
        ("a: 1e999", "not a finite number"),
        ("a: b: c", "mapping values are not allowed here"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_refused(text, problem):
    with pytest.raises(ConfigError, match=r"^file\.yaml") as caught:
        parse_yaml(text, "file.yaml")
    assert problem in str(caught.value)


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc.-: 1e\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=10,
)


@given(JSON_LIKE)
def test_what_pyyaml_dumps_is_read_back(value):
    read = parse_yaml(yaml.safe_dump(value), "test")
    assert read == value or (isinstance(value, float) and math.isclose(read, value))
