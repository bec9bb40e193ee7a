"""What every configuration section shares: strict, frozen, no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from typing import Any

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the values and the remedy."""

    is_user_error = True


class Section(BaseModel):
    """Base of all sections: unknown keys fail, values are frozen once resolved, types are not coerced loosely.

    A section may inherit keys from a plain dataclass beside this; their docstrings describe them as if they stood here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for base in cls.__mro__:
            if dataclasses.is_dataclass(base) and not issubclass(base, Section):
                for name, text in _field_docstrings(base).items():
                    cls.__pydantic_fields__[name].description = cls.__pydantic_fields__[name].description or text


@functools.cache
def _field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = inspect.cleandoc(text.value.value)  # type: ignore[union-attr, arg-type]
    return found
