"""Validation errors of pydantic, said in one line each: where, what, and the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.secrets import mask_credentials

Location = tuple["str | int", ...]

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section with keys of its own",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length} items",
    "too_long": "a list of at most {max_length} items",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def explain(
    error: ValidationError, root: type[Section], origin: Callable[[Location], str], prefix: Location = ()
) -> ConfigError:
    """Turn pydantic's report into a ConfigError with one line per mistake.

    Args:
        error: what pydantic raised for `root`.
        root: the section that was validated.
        origin: names the file or override that a location came from.
        prefix: location of `root` in the whole configuration.
    """
    details = error.errors(include_url=False)
    lines = [_line(item, root, origin, prefix) for item in details if not _is_echo(item, details)]
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n  - ".join([f"{len(lines)} mistakes in the configuration:", *lines]))


def dotted(location: Location) -> str:
    """`("cms", "levels", 0)` as the user writes it: `cms.levels.0`."""
    return ".".join(str(part) for part in location)


def key_paths(section: type[Section], prefix: Location = ()) -> Iterator[Location]:
    """All keys below a section, depth first; list items appear as index 0."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        inner = section_in(field.annotation)
        if inner is not None:
            item: Location = (0,) if get_origin(field.annotation) is tuple else ()
            yield from key_paths(inner, (*prefix, name, *item))


def nearest_key(location: Location, root: type[Section]) -> Location:
    """The known key most like the unknown one at `location`, preferring its own section."""
    unknown, section = str(location[-1]), location[:-1]

    def likeness(candidate: Location) -> float:
        same_section = tuple(0 if isinstance(part, int) else part for part in section) == candidate[:-1]
        return difflib.SequenceMatcher(None, unknown.lower(), str(candidate[-1])).ratio() + 0.15 * same_section

    best = max((path for path in key_paths(root) if isinstance(path[-1], str)), key=likeness)
    same_depth = len(best) == len(location) and all(
        a == b or isinstance(b, int) for a, b in zip(best[:-1], section, strict=True)
    )
    return (*section, best[-1]) if same_depth else best


def _line(item: ErrorDetails, root: type[Section], origin: Callable[[Location], str], prefix: Location) -> str:
    location: Location = item["loc"]
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    where = f"{origin(prefix + location)}: "
    key = dotted(prefix + location)
    if kind == "extra_forbidden":
        return f"{where}unknown key {key}; did you mean {dotted(prefix + nearest_key(location, root))}?"
    if kind == "missing":
        return f"{where}{key} is required{_description(location, root)}"
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    expected = _EXPECTED[kind].format(**bounds) if kind in _EXPECTED else item["msg"]
    line = f"{where}{key} must be {expected}, not {_shown(item['input'])}"
    line += _yaml_hint(kind, item["input"])
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = difflib.get_close_matches(str(item["input"]), choices, n=1, cutoff=0.5)
        line += f"; did you mean {near[0]}?" if near else ""
    return line


def _yaml_hint(kind: str, value: Any) -> str:
    """What YAML 1.2 wants written otherwise: no underscores in numbers, quotes around text that looks like a number."""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = value.replace("_", "")
        return f"; write {plain}" if "_" in value and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", plain) else ""
    return "; put it in quotes" if kind == "string_type" and isinstance(value, (int, float)) else ""


def _is_echo(item: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """A list whose items failed is also reported as too short; the items' own errors say it all."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        other["loc"][:depth] == item["loc"] for other in details if len(other["loc"]) > depth
    )


def _description(location: Location, root: type[Section]) -> str:
    """What the key at `location` means, in brackets; nothing for the items of a list."""
    section: type[Section] | None = root
    for part in location[:-1]:
        if isinstance(part, str) and section is not None:
            section = section_in(section.model_fields[part].annotation)
    field = section.model_fields.get(str(location[-1])) if section is not None else None
    return f" ({field.description.rstrip('.')})" if field is not None and field.description else ""


def section_in(annotation: Any) -> type[Section] | None:
    """The section class in a field's annotation: itself, the item of a tuple, or an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_in(arg)) is not None), None)


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else mask_credentials(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
