"""docs/extending.md works as it is written: its files, lines and commands, in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"
_BLOCK = re.compile(r"<!-- (write|insert|run)(?:: (\S+))? -->\n```\w*\n(.*?)```", re.DOTALL)
_REGISTRY_BEGINS = "    {\n"


def copy_of_the_source(directory: Path) -> Path:
    for folder in ("hope_megatron", "data_pipeline", "launch", "configs", "tests"):
        shutil.copytree(ROOT / folder, directory / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, directory)
    return directory


def insert(path: Path, line: str) -> None:
    """Put a row at the head of the file's registry."""
    text = path.read_text(encoding="utf-8")
    assert text.count(_REGISTRY_BEGINS) == 1, f"{path} has no single registry"
    path.write_text(text.replace(_REGISTRY_BEGINS, _REGISTRY_BEGINS + line), encoding="utf-8")


def run(commands: str, directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    output = ""
    for command in commands.splitlines():
        words = command.split()
        words[:1] = [sys.executable, "-m", "hope_megatron"] if words[0] == "hope" else [sys.executable]
        done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        output += done.stdout
    return output


def test_the_page_works_as_written(tmp_path: Path) -> None:
    source, outputs = copy_of_the_source(tmp_path / "source"), []
    for kind, name, body in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "run":
            outputs.append(run(body, source))
        elif kind == "insert":
            insert(source / name, body)
        else:
            assert not (source / name).exists(), f"{name} is there already"
            (source / name).write_text(body, encoding="utf-8")
    assert len(outputs) == PAGE.read_text(encoding="utf-8").count("<!-- run -->") >= 3
    said = "".join(outputs)
    for words in ("lion ", "numpy ", "delta_decay", "csv ", "reversal ", "**reversal**", "sums "):
        assert words in said, said
    assert said.count(" passed") == len(
        re.findall(r"^python -m pytest", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )
