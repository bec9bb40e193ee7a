"""Variables of srun and mpirun become torch's, or one line that names them. The dictionaries are what Slurm 22.05 and Open MPI 4.1
set, without what is not read."""

from __future__ import annotations

import pytest

from hope_megatron.runtime.launchers import adopt_launcher, first_host, tasks_per_node
from hope_megatron.runtime.rank import default_processes
from hope_megatron.runtime.world import World, WorldError, launched_world

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1157169153",
}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_a_task_of_srun():
    environment = dict(SRUN)
    assert adopt_launcher(environment) == "srun"
    assert launched_world(environment) == World(2, 3, 0)
    assert (environment["LOCAL_WORLD_SIZE"], environment["MASTER_ADDR"]) == ("1", "node1")
    assert environment["MASTER_PORT"] == str(12000 + 41 + 997 * 2)
    assert adopt_launcher(environment) is None, "a second call finds its own variables, which agree"


def test_a_process_of_mpirun():
    environment = dict(MPIRUN)
    other = {**MPIRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert adopt_launcher(environment) == adopt_launcher(other) == "mpirun"
    assert launched_world(environment) == World(1, 2, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"] == other["MASTER_PORT"]
    two_nodes = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "5"}
    assert adopt_launcher(two_nodes) == "mpirun" and (two_nodes["MASTER_ADDR"], two_nodes["MASTER_PORT"]) == (
        "gpu7",
        "5",
    )


def test_mpirun_counts_where_srun_started_its_daemons():
    environment = {**SRUN, **MPIRUN}
    assert adopt_launcher(environment) == "mpirun" and launched_world(environment) == World(1, 2, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # a batch script
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_one_task_is_no_world(environment):
    before = dict(environment)
    assert adopt_launcher(environment) is None and environment == before and launched_world(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {**SRUN, **TORCH, "TORCHELASTIC_RUN_ID": "x"},  # torchrun in each task
        {**SRUN, **TORCH, "RANK": "2", "WORLD_SIZE": "3"},
        {**SRUN, **TORCH, "RANK": "5", "WORLD_SIZE": "6"},  # two processes of each task
    ],
)
def test_torch_variables_that_fit_stay(environment):
    before = dict(environment)
    assert adopt_launcher(environment) is None and environment == before


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**SRUN, **TORCH}, "RANK=1 WORLD_SIZE=2, but srun says this is process 2 of 3"),
        ({**MPIRUN, **TORCH, "RANK": "0"}, "RANK=0 WORLD_SIZE=2, but mpirun says this is process 1 of 2"),
        ({**SRUN, "SLURM_PROCID": "3"}, "SLURM_PROCID=3 must be from 0 to 2"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID=x"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "do not fit SLURM_STEP_NUM_TASKS=3"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "2(x3),1"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "-x MASTER_ADDR=HOST"),
    ],
)
def test_contradictions_are_one_line(environment, words):
    with pytest.raises(WorldError) as caught:
        adopt_launcher(environment)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_short_forms_of_slurm():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert first_host("gpu[007-009,12],login") == "gpu007"
    assert first_host("rack[1-2]node[03,5]-ib") == "rack1node03-ib"
    assert first_host("alone") == "alone"


@pytest.mark.parametrize(
    ("tensor_parallel", "gpus", "processes"),
    [(1, 0, 1), (2, 0, 2), (1, 8, 8), (2, 8, 8), (3, 8, 6), (4, 2, 4)],
)
def test_processes_are_all_visible_gpus_in_whole_groups(tensor_parallel, gpus, processes):
    """4 for 2 GPUs: too many, which is refused with its reason, and never one group across a smaller number."""
    assert default_processes(tensor_parallel, gpus) == processes
