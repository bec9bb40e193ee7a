"""The six commands of the README, from text to a trained run, as they are written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_from_data_to_a_launched_run(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- executed by tests/integration/test_readme.py -->\n```bash\n(.*?)```", page, re.DOTALL)
    commands = block.splitlines()
    assert len(commands) == 6
    for command in commands:
        words = [sys.executable, "-m", "hope_megatron", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
        if words[3] == "launch":  # whether its checks pass depends on the Slurm of the machine; the script does not
            assert "exec python -m launch.supervisor" in done.stdout and "# checks" in done.stdout, done.stderr[-2000:]
            continue
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert '"complete": true' in (tmp_path / "runs/hope_tiny_cpu/summary.json").read_text()
