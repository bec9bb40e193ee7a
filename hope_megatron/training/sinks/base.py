"""What a tracker does. The thread that feeds it, its repetitions and its memory are in training/tracking.py."""

from __future__ import annotations

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hope_megatron.config.run import RunConfig
from hope_megatron.config.secrets import mask_credentials
from hope_megatron.training.run_directory import RunDirectory


class TrackingError(Exception):
    """What a tracker was asked to do cannot be done, now or later."""

    is_user_error = True


@dataclass(frozen=True)
class Opening:
    """What a sink is opened with.

    Attributes:
        config: of the run. `model_dump(mode="json")` of it holds no password.
        directory: of the run.
        tags: what to find the run by.
        state: what the sink itself put there at an earlier start, and `sent_step`; {} at the first. It may be changed, and is
            saved as JSON after opening and after every record.
    """

    config: RunConfig
    directory: RunDirectory
    tags: Mapping[str, str]
    state: dict[str, Any]


class Sink(ABC):
    """One tracker. Every method runs on a thread of its own, may take its time, and may raise: it is tried again."""

    title: ClassVar[str]
    """For messages."""

    @abstractmethod
    def __init__(self, opening: Opening) -> None:
        """Connect, and begin the run, or go on with the one that `opening.state` names."""

    @abstractmethod
    def send(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        """Take one record: finite numbers by name, and the Unix time at which it was made. Steps rise."""

    @abstractmethod
    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        """End the run: FINISHED, FAILED or KILLED. The files that are there belong to it."""

    @classmethod  # noqa: B027 (many have nothing to check)
    def check(cls, config: RunConfig) -> None:
        """Find mistakes before the run trains, and without waiting for anybody who does not answer.

        Raises:
            TrackingError: saying what is wrong and what to do.
        """

    @classmethod
    def where(cls, config: RunConfig) -> str:
        """Address or file, for messages, without passwords."""
        return str(config.run_dir)

    @classmethod
    def is_lasting(cls, error: Exception) -> bool:
        """Whether trying again would fail the same way: a mistake of the user, not a server that is away."""
        if isinstance(error, (TrackingError, ImportError)):
            return True
        return isinstance(
            error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
        )


def require_package(module: str, extra: str) -> None:
    """Insist on a package that an extra installs.

    Raises:
        TrackingError: with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise TrackingError(
            f"tracking.sinks has {extra}, and the package {module} is not installed: pip install -e '.[{extra}]' "
            "in the source directory, or leave it out"
        )


def brief(error: Exception) -> str:
    """The first line of an error, without passwords."""
    text = mask_credentials(str(error).strip())
    if isinstance(error, TrackingError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def finite_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl is a number that every tracker takes."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and text values of a configuration."""
    if not isinstance(tree, Mapping):
        return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat
