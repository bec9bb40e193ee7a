"""Suites by name. A builder takes `SuiteOptions` and gives a `Suite`, with its settings resolved; nothing runs yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hope_megatron.runtime.registry import Registry, UnknownNameError
from hope_megatron.suites.errors import SuiteError

if TYPE_CHECKING:
    from hope_megatron.suites.suite import Suite, SuiteOptions

_FAMILIES = "hope_megatron.suites.families"
_BY_LENGTH = ("hope", "lengths")


class SuiteEntry(NamedTuple):
    """What the command needs to know of a suite before it is built."""

    target: str
    """Module and builder."""
    help: str
    """What it tests."""
    takes: tuple[str, ...] = ()
    """Of the options hope, lengths and data; every suite takes the others."""


SUITES: Registry[SuiteEntry] = Registry(
    "suite",
    {
        "languages": SuiteEntry(
            f"{_FAMILIES}:languages", "formal languages: parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n, shuffle-2", _BY_LENGTH
        ),
        "permutations": SuiteEntry(
            f"{_FAMILIES}:permutations", "state tracking: products of permutations of three and of five things", _BY_LENGTH
        ),
        "recall": SuiteEntry(f"{_FAMILIES}:recall", "copying and associative recall", _BY_LENGTH),
        "mad": SuiteEntry(
            f"{_FAMILIES}:mad", "MAD: compression, in-context and fuzzy recall, selective copying, memorization", _BY_LENGTH
        ),
        "needles": SuiteEntry(
            f"{_FAMILIES}:needles", "needles in a haystack by length: models trained here, or RUN", _BY_LENGTH
        ),
        "families": SuiteEntry(
            "hope_megatron.suites.tables:build", "every family of the paper's tables on text, recall and languages", _BY_LENGTH
        ),
        "ablations": SuiteEntry(
            "hope_megatron.suites.ablations:build", "HOPE without one of its parts at a time, on text and on recall"
        ),
        "classes": SuiteEntry(
            "hope_megatron.suites.incremental:build",
            "classes that arrive in groups: in context, InCA, fine-tuned, EWC, with sleep",
            ("hope", "data"),
        ),
        "domains": SuiteEntry(
            "hope_megatron.suites.domains:build",
            "continual pretraining over domains of text, by number of CMS levels, with sleep, and beside other families",
            ("lengths", "data"),
        ),
        "consolidation": SuiteEntry(
            "hope_megatron.suites.consolidation:build",
            "days of reading and nights of replay: what stays, what is forgotten, against fine-tuning and EWC",
        ),
    },
)  # fmt: skip


def build_suite(name: str, options: SuiteOptions) -> Suite:
    """The suite of a name, with its settings resolved; nothing runs yet.

    Raises:
        SuiteError: there is none of that name, or it cannot have these options.
    """
    try:
        builder = SUITES.open(name)
    except UnknownNameError as error:
        raise SuiteError(str(error)) from None
    return builder(options)
