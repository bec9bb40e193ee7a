"""YAML 1.2 without surprises: what is no JSON value, a duplicate key, a bomb or a bottomless file fails in one line.

PyYAML follows YAML 1.1, where `0200` is 128, `10:00` is 600, `1e-3` is a string and `no` is a boolean. Scalars here follow the
core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), for reading and for writing. The merge key `<<` stays.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from hope_megatron.config.base import ConfigError

MAX_CHARACTERS = 1 << 20
"""Longest document. The longest configuration of this project has 3,000 characters."""
MAX_DEPTH = 32
"""Deepest nesting, also of dotted keys."""
MAX_VALUES = 20_000
"""Most values of a document, after its aliases are written out."""

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
"""Tag, form and first characters of plain scalars; the first form that fits decides, and what fits none is text."""


def _resolvers(*others: dict[str, Any]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's table by first character ("" for empty text): the core schema, then other tables."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, form, first_characters in _CORE_SCHEMA:
        for first in first_characters:
            table.setdefault(first.strip("\0"), []).append((_TAG + name, re.compile(rf"^(?:{form})$")))
    for other in others:
        for first, entries in other.items():
            table.setdefault(first, []).extend(entries)
    return table


class _Loader(yaml.SafeLoader):
    """SafeLoader of the core schema that refuses what would otherwise be dropped, reinterpreted or never end."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = {  # noqa: RUF012 - PyYAML's own table: only tags of the core schema, nothing is built from others
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag in {None, *(_TAG + name for name in ("null", "bool", "str", "seq"))}
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, while depth and number allow."""
        if self._depth > MAX_DEPTH:
            raise _refusal(f"nested deeper than {MAX_DEPTH} levels", self.peek_event().start_mark)
        if self._count >= MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} values", self.peek_event().start_mark)
        self._count += 1
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text which YAML 1.2, or a reader of YAML 1.1, would take for something else."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == _TAG + "merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _refusal(f"key {key!r} is not a name; quote it", key_node.start_mark)
        if key in seen:
            raise _refusal(f"key {key!r} is given twice; remove one", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > 100:
        raise _refusal(f"a number of {len(text)} digits", node.start_mark)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    value = math.nan if text.lower().lstrip("+-") in (".inf", ".nan") else float(text)
    if not math.isfinite(value):
        raise _refusal(f"{text} is not a finite number", node.start_mark)
    return value


_Loader.add_constructor(_TAG + "map", _construct_mapping)
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        source: file name or override, for messages.

    Returns:
        What JSON can hold: mappings, lists, text, finite numbers, booleans, None.

    Raises:
        ConfigError: on bad syntax, duplicate or non-string keys, tags outside of the core schema, a number that is not
            finite, or a document that is longer, deeper or, with its aliases written out, larger than the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source}: longer than {MAX_CHARACTERS:,} characters, which no configuration is")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: {error.problem or error.context or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(data: Any) -> str:
    """YAML text of JSON values that `parse_yaml` reads back equal; keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _check_size(root: yaml.Node) -> None:
    """Count the values as if every alias were written out, each node once: a bomb doubles the count at every level."""
    sizes: dict[int, int | None] = {}  # by node; None while its children are counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _refusal("an alias refers to a value that contains it", node.start_mark)
            return known
        sizes[id(node)] = None
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total = 1 + sum(map(size, children))
        if total > MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} values, aliases written out", node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


def _refusal(problem: str, mark: yaml.Mark | None) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
