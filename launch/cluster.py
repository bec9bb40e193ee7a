"""The cluster file: what `hope launch` must know of a cluster and its queue. One YAML file per cluster, strict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.load import read_mapping
from hope_megatron.config.messages import explain
from hope_megatron.config.presets import config_names, find_config
from launch.options import Option, check_options

Word = Annotated[str, StringConstraints(pattern=r"^[^\s'\"\\]+$")]
"""A value for an option of Slurm: no spaces, quotes or backslashes."""


class HealthConfig(Section):
    """The check of the nodes before training."""

    enabled: bool = True
    """Check nodes at all."""
    timeout_s: int = Field(default=300, gt=0)
    """Nodes that have not answered by then count as bad."""
    min_free_scratch_gb: float = Field(default=5.0, ge=0)
    """Free space that the node's scratch directory must have."""
    min_bandwidth_gb_s: float | None = Field(default=None, gt=0)
    """All-reduce bus bandwidth, in a node and between neighbours, below which a node is bad; null only reports it."""
    max_clock_skew_s: float = Field(default=5.0, gt=0)
    """Difference to the median clock of all nodes."""


class ContainerConfig(Section):
    """A container in which the ranks run."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: an option of srun, with enroot. apptainer: `apptainer exec` before the ranks' command."""
    image: Word
    """Value of srun's --container-image, or the image of apptainer (a .sif file, or docker://...)."""
    options: tuple[Word, ...] = ()
    """More options of `apptainer exec`, such as --cleanenv; pyxis takes its own from `srun`."""
    mounts: tuple[Word, ...] = ()
    """More `HOST:CONTAINER` mounts; the run, its code and its data are always mounted under their own paths."""


class ClusterConfig(Section):
    """A cluster, or one kind of node of it."""

    partition: Word | None = None
    """Partition; null is the cluster's default."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features (sbatch --constraint)."""
    reservation: Word | None = None
    """Reservation to run in."""
    time_limit: Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")] = "24:00:00"
    """Time limit of one allocation, [days-]hours:minutes:seconds. A run that needs longer is requeued."""
    stop_before_end_s: int = Field(default=300, ge=10)
    """Seconds before the time limit at which the run saves and is requeued: longer than a step, an evaluation and a save."""
    exclusive: bool = True
    """Whole nodes."""

    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs of a node; 0 trains on CPU."""
    gpu_gres: Word = "gpu"
    """Slurm's name of them (`gpu`, `gpu:h100`)."""
    hardware: str = "cpu"
    """Row of the hardware table, for the memory check: h100, h200, a100, l40s, b200, cpu."""
    processes_per_node: int | None = Field(default=None, gt=0)
    """Ranks of a node; null is one per GPU, or one on CPU."""
    cpus_per_process: int = Field(default=1, gt=0)
    """CPU cores of a rank."""
    memory_per_node_gb: int | None = Field(default=None, ge=0)
    """Host memory to ask for; 0 is all of it, null the partition's default."""

    setup: tuple[str, ...] = ()
    """Shell lines that make `python` the right one: module loads, a virtual environment."""
    python: Word = "python"
    """Interpreter of the ranks and, outside of the container, of the supervisor (3.9 or newer, standard library)."""
    container: ContainerConfig | None = None
    """Container of the ranks; null runs them on the nodes themselves."""
    scratch: Path = Field(default=Path("/tmp"), validate_default=False)
    """Node-local directory for temporary files."""

    fabric: Literal["ethernet", "infiniband", "efa"] = "ethernet"
    """Network between nodes; decides the NCCL variables (launch/variables.py)."""
    network_interface: Word | None = None
    """Interface for rendezvous and gloo (`ib0`, `eth0`); null lets NCCL and gloo choose."""
    master_ports: tuple[int, int] | None = None
    """First and last port that a firewall lets through for the rendezvous; null takes a free one from the system."""
    env: dict[str, str] = Field(default={})
    """More environment variables for all ranks; they win over the table."""

    sbatch: dict[str, Option] = Field(default={})
    """More options of sbatch by their long names: `sbatch: {mail-user: me@example.org, mail-type: END}`. true is an option
    without a value."""
    srun: dict[str, Option] = Field(default={})
    """More options of every srun that starts ranks: `srun: {mpi: none, cpu-bind: cores}`."""

    max_restarts: int = Field(default=3, ge=0)
    """Errors of the program in a row, without coming further, after which a run gives up. The same error at the same step in two
    attempts is enough."""
    max_transient_restarts: int = Field(default=20, ge=0)
    """The same for faults that may pass: killed and hanging ranks, networks, disks."""
    max_node_failures: int = Field(default=2, gt=0)
    """Failures on one node after which the run avoids it."""
    leave_out_slow_nodes: bool = False
    """When an attempt ends (a failure, the time limit), avoid the node of a rank that the last three comparisons found slow."""
    health: HealthConfig = HealthConfig()
    """The check of the nodes before training."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def time_limit_s(self) -> int:
        """The time limit in seconds."""
        return parse_time_limit(self.time_limit)

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        find_hardware(self.hardware)
        if self.gpus_per_node and self.hardware == "cpu":
            raise ConfigError(
                f"gpus_per_node={self.gpus_per_node} with hardware=cpu; name the GPU, for example hardware: h100"
            )
        if self.gpus_per_node and self.ranks_per_node != self.gpus_per_node:
            raise ConfigError(
                f"processes_per_node={self.processes_per_node} with gpus_per_node={self.gpus_per_node}: each rank drives one GPU; "
                "leave processes_per_node out"
            )
        if self.stop_before_end_s * 2 > self.time_limit_s:
            raise ConfigError(
                f"stop_before_end_s={self.stop_before_end_s} leaves no time to train within time_limit={self.time_limit}; "
                "lower it, or ask for more time"
            )
        if self.master_ports is not None and not 1024 <= self.master_ports[0] <= self.master_ports[1] <= 65535:
            raise ConfigError(
                f"master_ports={list(self.master_ports)} is not a range within 1024 to 65535, first to last"
            )
        check_options("sbatch", self.sbatch)
        check_options("srun", self.srun)
        if self.container is not None and self.container.options and self.container.runtime != "apptainer":
            raise ConfigError(
                "container.options are those of apptainer; options of pyxis go under srun (container-writable: true)"
            )
        if not self.scratch.is_absolute():
            raise ConfigError(f"scratch={self.scratch} is not an absolute path")
        for line in self.setup:
            if "\n" in line:
                raise ConfigError(f"setup line {line!r} has a line break; make it two items")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"env: {name!r} is not the name of a variable")
        return self


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """Load a cluster file by path, or by its name in configs/clusters.

    Raises:
        ConfigError: if there is no such file or it is wrong; one line per mistake.
    """
    path = find_config(name_or_path, "clusters")
    data = read_mapping(path)
    try:
        return ClusterConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise explain(error, ClusterConfig, lambda location: str(path)) from None


def cluster_names() -> list[str]:
    """Names that `load_cluster` knows."""
    return config_names("clusters")


def parse_time_limit(text: str) -> int:
    """Seconds of a Slurm time: `1-00:00:00` or `24:00:00`."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
