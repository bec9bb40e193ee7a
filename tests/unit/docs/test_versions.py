"""Packages, versions and extras: setup.py, the locks in constraints/ and docs/install.md say the same."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[3]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def requirements(metadata: dict[str, Any]) -> Iterator[Requirement]:
    for texts in (metadata["install_requires"], *metadata["extras_require"].values()):
        yield from map(Requirement, texts)


@pytest.mark.parametrize("lock", ["newest", "oldest"])
def test_every_package_is_locked_at_a_version_that_setup_allows(metadata: dict[str, Any], lock: str) -> None:
    lines = (ROOT / f"constraints/{lock}.txt").read_text(encoding="utf-8").splitlines()[1:]
    locked = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    assert list(locked) == sorted(locked) and len(locked) == len(lines)
    for requirement in requirements(metadata):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints/{lock}.txt"
        assert version in requirement.specifier, f"{requirement} excludes {version} of constraints/{lock}.txt"


def test_the_page_names_every_extra(metadata: dict[str, Any]) -> None:
    section = (ROOT / "docs/install.md").read_text(encoding="utf-8").split("## Extras")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(metadata["extras_require"])
