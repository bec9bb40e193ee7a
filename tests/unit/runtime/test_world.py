"""Launcher variables: a world, no world, or one line that names them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hope_megatron.cli.main import COMMANDS, main
from hope_megatron.runtime.world import REQUIRED, World, WorldError, forget_launcher, launched_world

FULL = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture(autouse=True)
def shell(monkeypatch):
    """A shell without a launcher's variables, whatever the tests were started by."""
    for name in (*REQUIRED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, None),
        ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}, None),
        ({"LOCAL_RANK": "3"}, None),
        (FULL, World(1, 2, 0)),
        ({**FULL, "LOCAL_RANK": "1"}, World(1, 2, 1)),
        ({**FULL, "RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0)),
    ],
)
def test_a_world_or_none(environment, world):
    assert launched_world(environment) == world


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK, MASTER_ADDR, MASTER_PORT are not set"]),
        ({"RANK": "", "WORLD_SIZE": ""}, ["RANK= WORLD_SIZE=", "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not"]),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ["RANK=0 WORLD_SIZE=1", "MASTER_ADDR, MASTER_PORT are not set"]),
        ({**FULL, "MASTER_PORT": ""}, ["MASTER_PORT is not set, or empty"]),
        ({**FULL, "RANK": "one"}, ["RANK=one", "not all whole numbers"]),
        ({**FULL, "LOCAL_RANK": "x"}, ["not all whole numbers"]),
        ({**FULL, "RANK": "2"}, ["RANK=2", "RANK must be from 0 to 1"]),
        ({**FULL, "RANK": "-1"}, ["RANK must be from 0 to 1"]),
        ({**FULL, "WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "WORLD_SIZE must be at least 1"]),
    ],
)
def test_left_over_variables_are_one_line_that_names_them(environment, words, shell, tmp_path, capsys):
    with pytest.raises(WorldError) as caught:
        launched_world(environment)
    assert caught.value.is_user_error and len(str(caught.value).splitlines()) == 1
    for name, value in environment.items():
        shell.setenv(name, value)
    for command in (["train", str(tmp_path / "x.yaml")], ["eval", "lm", "runs/x", "--tasks", "piqa"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the environment has ") and len(error.splitlines()) == 1
        assert "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in error
        for word in words:
            assert word in error


@pytest.mark.parametrize("command", [["train", "hope_tiny_cpu"], ["eval", "lm", "runs/x", "--tasks", "piqa"]])
def test_nproc_beside_a_launcher_is_refused(command, shell, capsys):
    for name, value in FULL.items():
        shell.setenv(name, value)
    assert main([*command, "--nproc", "2"]) == 2
    assert "--nproc 2 starts processes, but RANK=1 WORLD_SIZE=2 say" in capsys.readouterr().err


def test_commands_of_one_process_forget_the_launcher(shell, capsys):
    """Nothing below reads the variables, and no child inherits them."""
    assert {name for name, command in COMMANDS.items() if command.joins_world} == {"train", "eval lm", "consolidate"}
    for environment in (
        {"RANK": "0"},
        {"RANK": "", "WORLD_SIZE": "x"},
        {**FULL, "TORCHELASTIC_RUN_ID": "a", "GROUP_RANK": "0"},
    ):
        for name, value in environment.items():
            shell.setenv(name, value)
        for command in (["plan", "hope_tiny"], ["list"]):
            assert main(command) == 0
        assert not {*FULL, "TORCHELASTIC_RUN_ID", "GROUP_RANK"} & os.environ.keys()
    kept = {"PATH": "/bin", "MASTER": "x", "RANKING": "y"}
    environment = {**FULL, **kept}
    forget_launcher(environment)
    assert environment == kept


def test_who_waits_for_peers_says_so(tmp_path):
    """All four variables, left over in a shell: the first rank would wait for minutes, without a word."""
    environment = {**os.environ, **FULL, "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hope_megatron", "train", str(tmp_path / "none.yaml")],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = process.communicate(timeout=60)[1]
    first = said.splitlines()[0]
    assert first.startswith(
        "process 0 of 2, by RANK WORLD_SIZE MASTER_ADDR MASTER_PORT: waiting for the others at 127.0.0.1:29511"
    )
    assert "unset these" in first


def test_a_dry_run_under_a_launcher_trains_nothing(tmp_path):
    """Before, `torchrun ... hope train FILE --dry-run` trained."""
    for rank in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "hope_megatron", "train", "hope_tiny_cpu", "--dry-run", f"output_dir={tmp_path}"],
            env={**os.environ, **FULL, "RANK": rank}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("# 2 processes" in done.stdout) == (rank == "0")
    assert not any(tmp_path.iterdir())
