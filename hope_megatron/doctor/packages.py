"""Python, and the packages that the project needs."""

from __future__ import annotations

import platform
import sys

from hope_megatron.config.environment import installed_versions
from hope_megatron.doctor.finding import MISSING, OK, WARNING, Finding


def check_python() -> list[Finding]:
    """The interpreter's version."""
    text = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("Python", OK, text)]
    return [Finding("Python", MISSING, text, "use Python 3.11, 3.12 or 3.13")]


def check_distributions() -> list[Finding]:
    """Required distributions and their versions, against the installed package's own requirements."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("hope_megatron") or []
    except PackageNotFoundError:
        advice = "pip install -e . in the source directory, or make quickstart, which does it"
        return [Finding("packages", WARNING, "hope_megatron runs from its sources, not installed", advice)]
    from packaging.requirements import Requirement

    findings, fine = [], []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_versions((requirement.name,))[requirement.name]
        if version is None:
            findings.append(Finding(requirement.name, MISSING, "not installed", f'pip install "{requirement}"'))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{version}, outside the tested {requirement.specifier}"
            findings.append(Finding(requirement.name, WARNING, text, f'pip install "{requirement}"'))
        else:
            fine.append(f"{requirement.name} {version}")
    return [Finding("packages", OK, ", ".join(fine)), *findings]
