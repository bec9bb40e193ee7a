"""The image definitions: Apptainer's makes what the Dockerfile makes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "containers/Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "containers/hope.def").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """Name -> text of Apptainer's sections; "" is the header."""
    parts = re.split(r"^%(\w+)$", APPTAINER, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


@pytest.mark.parametrize(
    "pattern",
    [
        r"apt-get install --yes --no-install-recommends ([^\n\\]+)",
        r"pip install \"[^\"\[]+\[([^\]]+)\]\"",
        r"pip install --index-url \"\$\{\w+\}\" (torch==[\d.]+)",
        r"BREAK_SYSTEM_PACKAGES=(1)",
        r"DS_BUILD_OPS=(0)",
        r"(PIP_CONSTRAINT=\"\")",
    ],
)
def test_both_install_the_same(pattern):
    docker, apptainer = (re.findall(pattern, text) for text in (DOCKERFILE, sections()["post"]))
    assert len(docker) == 1 and [found.strip() for found in docker] == [found.strip() for found in apptainer]


def test_the_base_image_is_an_argument_with_a_default():
    used = set(re.findall(r"\{\{ (\w+) \}\}", APPTAINER))
    given = set(re.findall(r"^ +(\w+)=", sections()["arguments"], re.MULTILINE))
    assert used == given == {"BOOTSTRAP", "BASE", "TORCH_INDEX"}


def test_scripts_parse_and_files_exist():
    for name in ("post", "runscript", "test"):
        script = re.sub(r"\{\{ \w+ \}\}", '""', sections()[name])
        subprocess.run(["bash", "-n", "-c", script], check=True, timeout=10)
    copied = [line.split()[0] for line in sections()["files"].strip().splitlines()]
    assert {"setup.py", "README.md", "configs", "hope_megatron"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
