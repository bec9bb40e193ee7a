"""Which library computes each part of a training step: chosen once, said once in one table, kept for the run's record.

`step_parts.py` lists the parts and, best first, who can compute them. No torch here: `hope doctor` and `hope list` read it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class LibraryError(RuntimeError):
    """The library that was asked for cannot serve here. The message says why and what to set."""

    is_user_error = True


class Where(NamedTuple):
    """What a choice may depend on, of a run and of the device that it runs on."""

    device: str
    """Type of the device: "cpu", "cuda"."""
    precision: str = "bf16"
    """`training.precision`."""
    zero_stage: int = 1
    cpu_offload: bool = False
    learns_in_context: bool = False
    """Whether inner gradients are taken through the layers."""
    deterministic: bool = False
    conv_taps: int = 4
    conv_channels: int = 0
    """Taps and channels of a rank's short convolution."""
    elsewhere: bool = False
    """A rehearsal: what is installed here says nothing about the machine that will run. `auto` then takes what PyTorch has."""


Reason = Callable[[Where], str | None]
"""Why something is not so, in words; None if it is."""


class Candidate(NamedTuple):
    """Someone who can compute a part."""

    name: str
    """The value of `training.libraries.PART` that asks for it."""
    what: str
    target: str
    """`module:attribute` of what computes; see `step_parts.implementation`."""
    why_not: Reason = lambda where: None
    """Why it cannot serve."""
    unwise: Reason = lambda where: None
    """Why `auto` passes it over although it could."""
    modules: tuple[str, ...] = ()
    """Modules of the library, which must load before it is chosen for a run."""
    check: str = ""
    """`module:attribute` of a function of a device type that holds it against PyTorch, and says what is wrong; run before it is
    chosen for a run. Empty: none."""


class Part(NamedTuple):
    """A part of a step."""

    what: str
    candidates: tuple[Candidate, ...]
    """Best first. The last one serves everywhere."""
    left_out: str = ""
    """Other libraries that have this part, and why they are not used."""

    @property
    def help(self) -> str:
        """For people who choose."""
        known = "; ".join(f"{candidate.name}: {candidate.what}" for candidate in self.candidates)
        return f"{self.what}. {known}" + (f". Not used: {self.left_out}" if self.left_out else "")

    @property
    def target(self) -> str:
        """What serves everywhere."""
        return self.candidates[-1].target


class Choice(NamedTuple):
    """Who computes a part, and why not those before."""

    part: str
    library: Candidate
    passed_over: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """For files."""
        return {"part": self.part, "library": self.library.name, "passed_over": list(self.passed_over)}


chosen: dict[str, Choice] = {}
"""The choice for each part that was made last in this process."""


def find_choices(
    parts: Mapping[str, Part], settings: Mapping[str, str], where: Where, *, try_out: bool = False
) -> list[Choice]:
    """Who would compute each part.

    Args:
        parts: see step_parts.PARTS.
        settings: a candidate's name or "auto", by part; missing is auto.
        where: the run and its device.
        try_out: load libraries, and hold them against PyTorch on the device; False asks only whether they are installed.

    Raises:
        LibraryError: a candidate that is asked for by name cannot serve.
    """
    return [_find(name, part, settings.get(name, "auto"), where, try_out) for name, part in parts.items()]


def _find(name: str, part: Part, setting: str, where: Where, try_out: bool) -> Choice:
    passed_over: list[str] = []
    for candidate in part.candidates:
        if setting not in ("auto", candidate.name):
            continue
        reason = candidate.why_not(where)
        if reason is None and setting == "auto":
            reason = candidate.unwise(where)
        if reason is None and try_out and not where.elsewhere:
            reason = _fails(candidate, where.device)
        if reason is None:
            return Choice(name, candidate, tuple(passed_over))
        passed_over.append(f"{candidate.name}: {reason}")
    known = ", ".join(["auto", *(candidate.name for candidate in part.candidates)])
    why = "; ".join(passed_over).removeprefix(f"{setting}: ") or f"it knows {known}"
    raise LibraryError(f"training.libraries.{name}={setting} cannot serve here: {why}. Set it to auto, or mend that")


@functools.lru_cache(maxsize=64)
def _fails(candidate: Candidate, device: str) -> str | None:
    """Why a library that is installed cannot be used: it does not load, or computes something else."""
    try:
        for module in candidate.modules:
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"it is installed but does not load ({type(error).__name__}: {error})"
    return load(candidate.check)(device) if candidate.check else None


def choose(parts: Mapping[str, Part], settings: Mapping[str, str], where: Where) -> list[Choice]:
    """Choose for this process, and say it if it is not what was said last. Raises as `find_choices`."""
    choices = find_choices(parts, settings, where, try_out=True)
    news = {choice.part: choice for choice in choices}
    if news != chosen:
        chosen.clear()
        chosen.update(news)
        log.info("libraries of the step (training.libraries):\n%s", table(choices))
    return choices


def table(choices: list[Choice]) -> str:
    """Part, library, and who was passed over, a line each."""
    part, library = (
        max((len(text) for text in column), default=0)
        for column in ([c.part for c in choices], [c.library.name for c in choices])
    )
    return "\n".join(
        f"  {c.part:<{part}}  {c.library.name:<{library}}  {c.library.what}"
        + (f"; not {'; not '.join(c.passed_over)}" if c.passed_over else "")
        for c in choices
    )


@functools.lru_cache(maxsize=64)
def load(target: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def choices_restored() -> Iterator[None]:
    """Put back at the end what was chosen before."""
    before = dict(chosen)
    try:
        yield
    finally:
        chosen.clear()
        chosen.update(before)
