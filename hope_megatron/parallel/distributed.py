"""Process groups: one mesh of data parallel x tensor parallel, by Megatron-Core's parallel state, on gloo or NCCL."""

from __future__ import annotations

import datetime
import fcntl
import logging
import os
import socket
import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hope_megatron.config.base import ConfigError
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.layers.cpu import install_cpu_support
from hope_megatron.parallel.collectives import record_collectives
from hope_megatron.runtime.launchers import adopt_launcher
from hope_megatron.runtime.world import launched_world

log = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Mesh:
    """This process's place. Ranks of one tensor-parallel group are neighbours (same node)."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    """Ranks over which gradients are summed and ZeRO shards: they hold the same weights and see other tokens."""
    cp_size: int
    """Of these, neighbours that share their sequences."""
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup

    @property
    def cp_rank(self) -> int:
        """Which slice of its sequences this rank reads."""
        return self.dp_rank % self.cp_size

    @property
    def data_rank(self) -> int:
        """Which part of the batch this rank's sequences are."""
        return self.dp_rank // self.cp_size

    @property
    def data_size(self) -> int:
        """Parts of the batch."""
        return self.dp_size // self.cp_size

    @property
    def world_group(self) -> dist.ProcessGroup:
        """All ranks."""
        return dist.group.WORLD


def init_distributed(parallel: ParallelConfig, *, num_threads: int = 1, timeout_s: float = 1800.0) -> Mesh:
    """Join (or, without launcher variables, be) the world and build the groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them, or the variables of srun and mpirun.
    A default process group that is already there is used as it is.

    Args:
        parallel: the mesh.
        num_threads: CPU threads of torch operators in this process, when there is no GPU.
        timeout_s: seconds after which a collective that a peer never joins fails.

    Raises:
        ConfigError: if the world size is not divisible by the tensor-parallel size.
        WorldError: if the launcher variables name no world.
    """
    if dist.is_initialized():
        launched = None
        rank, world_size, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))
    else:
        adopt_launcher()
        launched = launched_world()
        rank, world_size, local_rank = launched or (0, 1, 0)
    if world_size % parallel.ranks_per_sequence:
        raise ConfigError(
            f"{world_size} processes are not divisible by {parallel.group_in_words}; "
            f"start a multiple of {parallel.ranks_per_sequence} processes, for example with --nproc"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(num_threads)
    install_cpu_support()
    timeout = datetime.timedelta(seconds=timeout_s)
    record_collectives()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if launched is not None:
            store = rendezvous_store(rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_parallel,
            context_parallel_size=parallel.context_parallel,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_s / 60,
        )
    there = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if there != (parallel.tensor_parallel, parallel.context_parallel):
        raise ConfigError(
            f"process groups exist with tensor parallel {there[0]} and context parallel {there[1]}, not "
            f"{parallel.tensor_parallel} and {parallel.context_parallel}; call shutdown_distributed() first"
        )
    return Mesh(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_parallel,
        dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        cp_size=parallel.context_parallel,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
    )


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a process, among those it sees: its own of all of the node's, or the only one (srun --gpus-per-task=1).

    Raises:
        ConfigError: more processes on the node than GPUs.
    """
    if visible == 1 or local_rank < visible:
        return min(local_rank, visible - 1)
    raise ConfigError(
        f"process {local_rank} of this node (counted from 0) sees {visible} GPUs; start at most {visible} processes per node"
    )


def rendezvous_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT. Rank 0 keeps it, and lets it listen on the interface of that address alone.

    torchrun keeps one itself, which is then used.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    if rank:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listening_address(host, one_node), port))
        listener.listen(world_size + 128)
        # the store closes the descriptor that it is given
        return dist.TCPStore(
            host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=os.dup(listener.fileno())
        )


def listening_address(host: str, one_node: bool) -> str:
    """Address of the interface on which rank 0 listens: that of `host`, or of GLOO_SOCKET_IFNAME if this node calls itself by a
    loopback address that other nodes cannot reach."""
    address = socket.gethostbyname(host)
    if one_node or not address.startswith("127."):
        return address
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        request = struct.pack("256s", interface.partition(",")[0].encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    log.warning(
        "%s is %s here, which other nodes cannot reach: the rendezvous listens on all interfaces. Set network_interface in the "
        "cluster file",
        host,
        address,
    )
    return ""


def set_group_timeouts(timeout_s: float) -> None:
    """Give every process group that exists this time-out; groups that libraries make for themselves begin with 30 minutes."""
    timeout = datetime.timedelta(seconds=timeout_s)
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) != "fake":  # a rehearsal's groups wait for nobody
            group.set_timeout(timeout)


def shutdown_distributed() -> None:
    """Leave all groups; `init_distributed` may be called again."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
