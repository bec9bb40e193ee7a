"""`hope convert`, `eval` and `generate` say in one line what was wrong with what they were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_megatron.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "--to", "hf", "out"], "no run directory with a complete checkpoint"),
        (["convert", "nowhere"], "--to hf DIR"),
        (["convert", "nowhere", "--to", "onnx", "out"], "unknown format 'onnx'"),
        (["convert", "nowhere", "--from", "hf", "--to", "hf", "out"], "--from hf does not lead --to hf"),
        (["convert", "nowhere", "--to", "hf", "out", "--max-shard-gib", "0"], "must be positive"),
        (["convert", "inspect", "nowhere"], "no run directory with a complete checkpoint"),
        (["eval", "nowhere"], "no run directory with a complete checkpoint"),
        (["generate", "nowhere", "--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["generate", "nowhere", "--prompt", "a", "--file", "b"], "cannot read the prompt b"),
        (["generate", "nowhere", "--file", "missing.txt"], "cannot read the prompt missing.txt"),
        (["generate", "nowhere", "--prompt", "a", "-n", "2", "--state", "s"], "one prompt and one sample"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # torch may be in this process already
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())
