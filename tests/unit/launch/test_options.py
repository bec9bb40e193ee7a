"""Options of sbatch and srun in cluster files, containers of both kinds, and what explains the keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from hope_megatron.cli.main import main
from launch.cluster import ClusterConfig
from launch.explain import explain_keys
from launch.options import option_words
from launch.script import command_script, container_options, container_prefix

PATHS = [Path("/runs"), Path("/code")]


def script(cluster: ClusterConfig) -> str:
    places = {"code": Path("/code"), "work_dir": Path("/home/me"), "log": Path("/l.log")}
    return command_script(cluster, "x", ["eval", "run"], gpus=0, **places)


def test_options_stand_in_script_and_srun():
    cluster = ClusterConfig(
        sbatch={"mail-user": "me@example.org", "comment": "two words $(touch x)", "nice": 10, "hold": False},
        srun={"mpi": "none", "unbuffered": True},
    )
    text = script(cluster)
    assert "#SBATCH --mail-user=me@example.org\n#SBATCH '--comment=two words $(touch x)'\n#SBATCH --nice=10\n" in text
    assert "hold" not in text and "exec srun --ntasks=1 --mpi=none --unbuffered python -m launch.command" in text
    assert option_words({"a": True, "b": False, "c": 0}) == ["--a", "--c=0"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sbatch": {"partition": "x"}}, "partition is set by partition of the cluster file"),
        ({"sbatch": {"time": "1:00"}}, "time is set by time_limit"),
        ({"sbatch": {"signal": "USR1"}}, "signal is set by hope launch itself"),
        ({"srun": {"nodelist": "a"}}, "srun: nodelist is set by hope launch itself"),
        ({"sbatch": {"--comment": "x"}}, "not the long name of an option"),
        ({"sbatch": {"comment": "x\n#SBATCH --uid=0"}}, "control character"),
        ({"container": {"image": "x", "options": ("--cleanenv",)}}, "those of apptainer"),
    ],
)
def test_what_something_else_decides_is_refused(keys, words):
    with pytest.raises((ValidationError, ValueError), match=words):
        ClusterConfig(**keys)


def test_containers_of_both_kinds():
    image = {"image": "hope.sif", "mounts": ("/a:/b",)}
    apptainer = ClusterConfig(
        gpus_per_node=8, hardware="h100", container={**image, "runtime": "apptainer", "options": ("--cleanenv",)}
    )
    assert container_options(apptainer, PATHS) == []
    prefix = container_prefix(apptainer, PATHS)
    assert (
        " ".join(prefix) == "apptainer exec --nv --bind=/runs:/runs,/code:/code,/a:/b --pwd=/code --cleanenv hope.sif"
    )
    pyxis = ClusterConfig(container=image)
    assert container_prefix(pyxis, PATHS) == [] and container_options(pyxis, PATHS)[0] == "--container-image=hope.sif"
    assert "apptainer exec --bind=/home/me:/home/me,/code:/code,/a:/b --pwd=/code hope.sif python" in script(
        ClusterConfig(container={**image, "runtime": "apptainer"})
    )


def test_every_key_is_explained(capsys):
    rows = explain_keys()
    assert [key for key, _, meaning in rows if not meaning] == []
    assert {"sbatch", "srun", "container.runtime", "health.timeout_s", "time_limit"} <= {key for key, _, _ in rows}
    assert main(["launch", "--explain"]) == 0
    assert "container.image  (required)" in capsys.readouterr().out
    assert main(["launch", "--explain", "--json"]) == 0
    assert [tuple(row.values()) for row in json.loads(capsys.readouterr().out)] == rows
    assert main(["launch"]) == 2
