"""What the pages show can be typed: every `hope` command in them parses, every file they link to is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hope_megatron.cli.main import parse

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
"""Records are left out: they quote the commands of their day."""

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img src=\"([^\"]+)\"")


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and `hope` commands of the code blocks of a page; a line may go on after a backslash."""
    fenced, pending, start = False, "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        text = pending + line.strip()
        if not (fenced or line.startswith("    ")) or not text.startswith("hope "):
            pending = ""
            continue
        start = start if pending else number
        if text.endswith("\\"):
            pending = text[:-1]
            continue
        pending = ""
        yield start, re.split(r"\s{2,}|\s#", text)[0]


def all_commands() -> list:
    return [pytest.param(command, id=f"{page.name}:{number}") for page in PAGES for number, command in commands(page)]


@pytest.mark.parametrize("command", all_commands())
def test_every_command_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parse(shlex.split(command)[1:])
    except SystemExit as leaving:
        pytest.fail(f"{command}\n{capsys.readouterr().err}" if leaving.code else f"{command} only prints help")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for groups in _LINK.findall(page.read_text(encoding="utf-8")):
        target = groups[0] or groups[1]
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_message_installs_from_an_index() -> None:
    """The package is on none: an extra is installed from the source directory, pip install -e '.[EXTRA]'."""
    sources = [
        path for folder in ("hope_megatron", "data_pipeline", "launch") for path in (ROOT / folder).rglob("*.py")
    ]
    for path in [*sources, *PAGES]:
        assert not re.search(r"pip install [^\n`]*hope_megatron\[", path.read_text(encoding="utf-8")), path


def test_commands_are_found() -> None:
    """The reader of pages itself: it sees fenced and indented blocks, and cuts comments."""
    found = [command for page in PAGES for _, command in commands(page)]
    assert len(found) > 60 and not any("  " in command for command in found)
