"""Suites by name."""

from __future__ import annotations

from collections.abc import Callable

from hope_megatron.suites import ablations, domains, families, incremental
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.suite import Suite, SuiteOptions

_BUILDERS: dict[str, Callable[[SuiteOptions], Suite]] = {
    "languages": families.languages,
    "permutations": families.permutations,
    "recall": families.recall,
    "mad": families.mad,
    "needles": families.needles,
    "ablations": ablations.build,
    "classes": incremental.build,
    "domains": domains.build,
}


def build_suite(name: str, options: SuiteOptions) -> Suite:
    """The suite of a name, with its settings resolved; nothing runs yet."""
    if name not in _BUILDERS:
        raise SuiteError(f"no suite {name!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](options)
