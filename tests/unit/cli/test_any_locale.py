"""Output in any locale and encoding: a replacement character where one is missing, never an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hope_megatron.cli.main import COMMANDS

ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
SCRIPT = """
import json, sys
from hope_megatron.cli.main import main
for command in json.loads(sys.argv[1]):
    try:
        code = main(command)
    except SystemExit as leave:
        code = leave.code
    print("exit code", code, flush=True)
"""


@pytest.mark.parametrize("locale", ASCII, ids=lambda locale: " ".join(f"{k}={v}" for k, v in locale.items()))
def test_every_command_speaks_ascii(locale, tmp_path):
    (tmp_path / "run.yaml").write_text("name: ü\nmodel: hope_tiny\n", encoding="utf-8")
    helps = [[*name.split(), "--help"] for name in COMMANDS]
    failing = [["plan", "höpe_tiny"], ["train", str(tmp_path / "run.yaml")], ["data", "inspect", "日本"]]
    commands = [["plan", "hope_tiny"], ["list"], *helps, *failing]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        env=environment | locale, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    text = done.stdout.decode("ascii")  # and nothing else
    assert "Traceback" not in text and done.returncode == 0, text
    codes = [int(line.split()[-1]) for line in text.splitlines() if line.startswith("exit code")]
    assert codes == [0] * (2 + len(helps)) + [2] * len(failing), text
    assert "hope_tiny ? model" in text  # the middle dot of plan's first line


def test_utf_8_keeps_its_characters():
    done = subprocess.run(
        [sys.executable, "-m", "hope_megatron", "plan", "hope_tiny"], capture_output=True, timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert "hope_tiny · model" in done.stdout.decode("utf-8")
