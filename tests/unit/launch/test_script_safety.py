"""No text from a configuration becomes shell: whatever it is, the script keeps its lines, or is refused."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cluster import ClusterConfig
from launch.errors import LaunchError
from launch.script import SECRETS_FILE, array_script, command_script, train_script, write_secrets
from launch.submission import LaunchDirectory, Submission

HOSTILE = st.text(
    alphabet=st.sampled_from(list("ab/ ~%'\"`$(){};&|<>\\#!*?=-\n\r\t\x00\x0b\x1b\u2028\u0085é")),
    min_size=1,
    max_size=30,
)
CLUSTER = ClusterConfig(python="python3", env={"TOKEN": "value"})


def scripts(text: str) -> list[str]:
    """Every script, with the text wherever one from a configuration can stand."""
    base = Path("/base") / text.lstrip("/")
    submission = Submission("name", 1, 1, 1, 1, 0, str(base / "code"), "python3")
    cluster = CLUSTER.model_copy(update={"env": {"TOKEN": text}})
    return [
        train_script(cluster, submission, LaunchDirectory(base)),
        array_script(cluster, submission, base, 3, 2),
        command_script(cluster, "name", ["eval", text], code=base, work_dir=base, log=base / "log", gpus=0),
    ]


def shape(script: str) -> list[str]:
    """The first word of each line."""
    return [line.split(" ")[0] for line in script.split("\n")]


@settings(max_examples=300, deadline=None)
@given(HOSTILE)
def test_any_text_keeps_its_line_or_is_refused(text: str) -> None:
    expected = [shape(script) for script in scripts("plain")]
    try:
        found = scripts(text)
    except LaunchError as error:
        assert "control character" in str(error)
        assert any(not character.isprintable() for character in text)
        return
    assert [shape(script) for script in found] == expected
    for script in found:
        assert "value" not in script.replace("the values", ""), "secrets stay out of scripts"
        for line in script.split("\n"):
            if line.startswith("#SBATCH "):
                assert len(shlex.split(line[len("#SBATCH ") :])) == 1
    cd = next(line for line in found[0].split("\n") if line.startswith("cd "))
    assert shlex.split(cd)[1] == str(Path("/base") / text.lstrip("/") / "code")


@pytest.mark.parametrize(
    "text",
    [
        "$(touch canary)",
        "`touch canary`",
        "a; touch canary",
        "a' ; touch canary '",
        "a && touch canary",
        "x\ntouch canary",
    ],
)
def test_scripts_run_nothing_but_the_command(tmp_path: Path, text: str) -> None:
    """Run by bash, with a python that writes down what it was called with."""
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$CALLED"; echo "$TOKEN" > "$CALLED.token"\n')
    program.chmod(0o755)
    run = tmp_path / text
    submission = Submission("name", 1, 1, 1, 1, 0, str(tmp_path), "python3")
    cluster = CLUSTER.model_copy(update={"env": {"TOKEN": text}})
    try:
        script = train_script(cluster, submission, LaunchDirectory(run))
    except LaunchError:
        assert "\n" in text
        return
    write_secrets(cluster, LaunchDirectory(run).path)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called")}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "called").read_text().splitlines() == ["-m", "launch.supervisor", str(run)]
    assert (tmp_path / "called.token").read_text() == text + "\n"
    assert not list(tmp_path.rglob("canary"))


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    write_secrets(CLUSTER, tmp_path)
    assert (tmp_path / SECRETS_FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / SECRETS_FILE).read_text() == "export TOKEN=value\n"
    write_secrets(CLUSTER.model_copy(update={"env": {"TOKEN": "other"}}), tmp_path)
    assert "other" in (tmp_path / SECRETS_FILE).read_text()
