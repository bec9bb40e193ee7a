"""Environment variables of a job, in one table with a reason for each. The reasons appear in the batch script.

What each process sets for itself (OpenMP, MLflow's patience) is in hope_megatron/runtime/process.py. A cluster file's
`env` wins over this table.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from launch.cluster import ClusterConfig


class Variable(NamedTuple):
    """One row of the table."""

    name: str
    value: str
    """`{interface}` and `{launch_dir}` are filled in."""
    where: str
    """gpu; infiniband or efa (GPU nodes of that fabric); interface (the cluster file gives one); name (it is a plain name)."""
    reason: str


TABLE = (
    Variable(
        "NCCL_SOCKET_IFNAME",
        "{interface}",
        "interface",
        "NCCL's bootstrap must not pick a management network or a container bridge",
    ),
    Variable("GLOO_SOCKET_IFNAME", "{interface}", "name", "the same for gloo, which knows no patterns like ^docker"),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "gpu",
        "Megatron-Core's tensor-parallel overlap needs kernels to start in the order of launch",
    ),
    Variable(
        "PYTORCH_ALLOC_CONF",
        "expandable_segments:True",
        "gpu",
        "less fragmentation, with the uneven sizes of memory states",
    ),
    Variable("NCCL_DEBUG", "WARN", "gpu", "says what failed in the network, and nothing else"),
    Variable(
        "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "gpu", "a hang leaves a record of the collective that each rank was in"
    ),
    Variable(
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        "{launch_dir}/nccl-trace-",
        "gpu",
        "where that record goes; the default is lost with the node",
    ),
    Variable(
        "NCCL_IB_TIMEOUT",
        "22",
        "infiniband",
        "17 s (4.096 us x 2^22) per try: outlasts a link that flaps or a switch that fails over",
    ),
    Variable("FI_PROVIDER", "efa", "efa", "libfabric must fail rather than fall back to TCP without a word"),
    Variable("FI_EFA_USE_HUGE_PAGE", "0", "efa", "huge pages break fork(), which starting subprocesses needs"),
)


def job_variables(cluster: ClusterConfig, launch_dir: Path) -> list[Variable]:
    """Rows that apply to jobs on a cluster, filled in; the cluster file's own last, instead of rows of the same name."""
    interface = cluster.network_interface
    where = (
        {"interface", "name"} if interface and not interface.startswith("^") else {"interface"} if interface else set()
    )
    if cluster.gpus_per_node:
        where |= {"gpu", cluster.fabric}
    rows = [
        row._replace(value=row.value.format(interface=interface, launch_dir=launch_dir))
        for row in TABLE
        if row.where in where and row.name not in cluster.env
    ]
    return [
        *rows,
        *(Variable(name, value, "cluster file", "from the cluster file") for name, value in cluster.env.items()),
    ]
