"""Who imports whom: arrows point down, and what runs on a login node imports no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_contracts_of_pyproject_hold():
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "hope_megatron",
        "hope_megatron.config",
        "hope_megatron.config.footprint",
        "hope_megatron.cli.main",
        "hope_megatron.ops.memory.rule",
        "data_pipeline",
        "launch",
        "launch.local",
    ],
)
def test_importing_brings_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_configuration_page_is_what_the_schema_says():
    done = subprocess.run(
        [sys.executable, "tools/make_config_docs.py", "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
