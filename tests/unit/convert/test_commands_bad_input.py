"""`hope export`, `import`, `checkpoint`, `eval` and `generate` say in one line what was wrong with what they were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_megatron.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "hf", "nowhere", "out"], "no run directory with a complete checkpoint"),
        (["export", "torchdist", "nowhere", "out"], "did you mean torch_dist?"),
        (["export", "hf", "nowhere", "out", "--max-shard-gib", "0"], "must be positive"),
        (["export", "hf", "nowhere", "out", "--tp", "2"], "hope export hf does not take --tp"),
        (["export", "deepspeed", "nowhere", "out", "--tp", "0"], "--tp 0 must be at least 1"),
        (["export", "llama", "nowhere", "out"], "llama can be imported, not exported"),
        (["import", "hf", "nowhere"], "give one target"),
        (["import", "hf", "nowhere", "--checkpoint", "out"], "hf holds weights only"),
        (["import", "hf", "nowhere", "--model", "out"], "hf carries its own configuration"),
        (["import", "hf", "nowhere", "run.yaml", "--tp", "2"], "need --checkpoint OUT"),
        (["list", "optimisers"], "hope list knows optimizers, "),
        (["checkpoint", "inspect", "nowhere"], "no run directory with a complete checkpoint"),
        (["checkpoint", "reshard", "nowhere", "out"], "give the new layout"),
        (["checkpoint", "average", "nowhere", "out"], "at least two checkpoints"),
        (["convert", "R", "--to", "hf", "D"], "say: hope export hf R D"),
        (["convert", "R", "--tp", "2", "--to", "deepspeed", "D"], "say: hope export deepspeed R D --tp 2"),
        (
            ["convert", "R@5", "--tp", "2", "--sequence-parallel", "O"],
            "hope checkpoint reshard R@5 O --tp 2 --sequence-parallel",
        ),
        (["convert", "D", "--from", "hf-llama", "--to", "model", "F"], "say: hope import llama D --model F"),
        (["convert", "D", "--from", "torch_dist", "--to", "run", "F"], "say: hope import torch_dist D F"),
        (["convert", "D", "--from", "deepspeed", "O"], "say: hope import deepspeed D --checkpoint O"),
        (["convert", "average", "A", "B", "O", "--weights", "1,2"], "say: hope checkpoint average A B O --weights 1,2"),
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
