"""The YAML dialect: YAML 1.2 where people stumble over 1.1, and nothing silently dropped."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.config import ConfigError
from hope_megatron.config.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, dump_yaml, parse_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
"""A list of 2^40 items in 40 lines."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", "1_000"),
        ("0200", 200),
        ("0010", 10),
        ("0123", 123),
        ("-007", -7),
        ("08", 8),
        ("0o17", 15),
        ("-0o17", "-0o17"),
        ("0o8", "0o8"),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("0.5e-0_1", "0.5e-0_1"),
        ("+1.5e3", 1500.0),
        ("1.", 1.0),
        ("10:00", "10:00"),
        ("24:00:00", "24:00:00"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'0200'", "0200"),
        ("!!str 0200", "0200"),
        ("!!int 0o17", 15),
        ("!!float 3", 3.0),
        ("y", "y"),
        ("off", "off"),
        ("TRUE", True),
        ("NULL", None),
        ("", None),
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
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: !!binary aaaa", "could not determine a constructor"),
        ("a: !!int ten", "invalid literal"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("&a [*a]", "an alias refers to a value that contains it"),
        ("[" * 5000, f"nested deeper than {MAX_DEPTH} levels"),
        ("- " * 5000, f"nested deeper than {MAX_DEPTH} levels"),
        ("[" + "1," * MAX_VALUES + "]", "more than 20,000 values"),
        ("# " + "x" * MAX_CHARACTERS, "longer than 1,048,576 characters"),
        (BOMB, "aliases written out"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [x, x]}", "{x: 1}"), "aliases written out"),
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
def test_what_is_dumped_is_read_back_by_either_reader(value):
    for read in (parse_yaml(dump_yaml(value), "test"), yaml.safe_load(dump_yaml(value))):
        assert read == value


@pytest.mark.parametrize(
    "text", ["0o17", "0200", "10:00", "1e3", "1_000", "no", "y", "=", "<<", "2024-01-01", ".inf", "", "~"]
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse_yaml(dump_yaml({"a": text}), "test") == yaml.safe_load(dump_yaml({"a": text})) == {"a": text}


@given(st.text("0123456789abcdefox_+-.:eE~<=[]{},#&*!|>'\"%@` \n", max_size=12))
def test_any_text_is_a_value_or_one_line(text):
    try:
        parse_yaml(text, "test")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
