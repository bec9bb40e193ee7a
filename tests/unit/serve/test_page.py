"""docs/serve.md against `hope serve` itself, from start to SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.cli.main import main
from hope_megatron.testing.checkpoints import make_checkpoint, model

__all__ = ["make_checkpoint", "model"]

pytest.importorskip("openai", reason="`pip install -e '.[test]'` brings it")
pytest.importorskip("transformers", reason="the server runs the exported model")

PAGE = Path(__file__).parents[3] / "docs/serve.md"


def wait_for_health(port: int, process: subprocess.Popen) -> None:
    import httpx2 as httpx

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"no server: {process.stderr.read().decode() if process.stderr else ''}")


def test_the_page(
    make_checkpoint: Callable[..., CheckpointSource], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_checkpoint()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hope_megatron", "serve", str(tmp_path / "run"), "--port", str(port)]
    command += ["--session-dir", str(tmp_path / "sessions"), "--name", "mine"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    try:
        wait_for_health(port, server)
        names: dict = {"URL": f"http://127.0.0.1:{port}/v1"}
        blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        assert names["model"] == "mine" and names["again"].usage.prompt_tokens < 10
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0, err.decode()
    assert out.decode().startswith(f"serving mine at http://127.0.0.1:{port}/v1")
    (saved,) = (tmp_path / "sessions").glob("*.session")
    assert saved.stat().st_size > 1000


def test_mistakes_are_said(
    make_checkpoint: Callable[..., CheckpointSource], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_checkpoint()
    run, tokens = str(tmp_path / "run"), tmp_path / "tokens"
    assert main(["serve", run, "--host", "0.0.0.0"]) == 2
    assert "lets other machines in; give --token-file" in capsys.readouterr().err
    tokens.write_text("x" * 16)
    tokens.chmod(0o644)
    assert main(["serve", run, "--token-file", str(tokens)]) == 2
    assert "chmod 600" in capsys.readouterr().err
    tokens.write_text("short\n")
    tokens.chmod(0o600)
    assert main(["serve", run, "--token-file", str(tokens)]) == 2
    assert "at least 16 characters" in capsys.readouterr().err
    assert main(["serve", run, "--max-batch", "0"]) == 2
    assert "--max-batch 0 must be positive" in capsys.readouterr().err
    tokens.write_text("# mine\n" + "y" * 32 + "\n")
    assert main(["serve", run, "--token-file", str(tokens), "--host", "0.0.0.0", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (
        shown["tokens"] == 1
        and shown["model_name"] == "run"
        and shown["device"] == "cpu"
        and "y" * 32 not in str(shown)
    )
