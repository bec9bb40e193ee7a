"""Completion, asked of a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hope_megatron.cli.completion import command_words
from hope_megatron.cli.main import COMMANDS, main


def complete(script: str, words: list[str]) -> list[str]:
    ask = f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _hope; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    words_of = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert words_of.stderr == ""
    return words_of.stdout.split()


def test_bash_completes_commands_options_and_names(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete(script, ["hope", "tr"]) == ["train"]
    assert complete(script, ["hope", "train", "--max"]) == ["--max-restarts"]
    assert "hope_tiny_cpu" in complete(script, ["hope", "train", "hope_tiny"])
    assert "one_node" in complete(script, ["hope", "launch", "x", "--cluster", "one"])
    assert {"lm", "memory", "suite"} <= set(complete(script, ["hope", "eval", "''"]))
    assert "prepare" in complete(script, ["hope", "data", "pre"])


def test_every_command_is_there():
    assert set(command_words()) == {name.split()[0] for name in COMMANDS}


@pytest.mark.parametrize(
    ("shell", "ask"),
    [
        (
            "fish",
            "source {file}; complete -C 'hope tr'; complete -C 'hope train hope_tiny_c'; complete -C 'hope train --max-r'",
        ),
        (
            "zsh",
            "autoload -U +X compinit; compinit -u -D; source {file}; print $_comps[hope]; print ${{functions[_hope]}}",
        ),
    ],
)
def test_other_shells_complete(shell, ask, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was made, not run")
    command = [shell, *(["-f"] if shell == "zsh" else []), "-c", ask.format(file=tmp_path / "script")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    words = done.stdout.split()
    if shell == "fish":
        assert words == ["train", "hope_tiny_cpu", "--max-restarts"]
    else:
        assert words[:2] == ["_bash_complete", "-o"] and "hope_tiny_cpu" in done.stdout
