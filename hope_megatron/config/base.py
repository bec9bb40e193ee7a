"""What every configuration section shares: strict, frozen, no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the values and the remedy."""

    is_user_error = True


class Section(BaseModel):
    """Base of all sections: unknown keys fail, values are frozen once resolved, types are not coerced loosely."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
