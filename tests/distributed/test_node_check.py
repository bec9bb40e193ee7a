"""The node check meets faults: a wrong sum, a slow link, a GPU that is not there."""

from __future__ import annotations

import pytest

from hope_megatron.testing.distributed import run_distributed
from launch.node_check import device_problems


def pair(rank, world_size, fault, min_bandwidth):
    """check_pair of two nodes with one rank each, over their own store, with a fault on the second."""
    import os
    import socket

    import torch.distributed as dist

    from launch import node_check

    ports = [None]
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1]]
    dist.broadcast_object_list(ports, src=0)
    dist.destroy_process_group()
    reduce = dist.all_reduce

    def broken(tensor, *args, **kwargs):
        result = reduce(tensor, *args, **kwargs)
        tensor[3] += 1
        return result

    if fault == "wrong sum" and rank == 1:
        dist.all_reduce = broken
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": str(rank)}
    nodes = ["localhost", "127.0.0.1"]
    report = {"node": nodes[rank], "problems": []}
    meeting = {"nodes": nodes, "port": ports[0]}
    node_check.check_pair({"pairs": [meeting], "gpus": 0, "min_bandwidth_gb_s": min_bandwidth}, report)
    return report


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "min_bandwidth", "words"),
    [("", None, ""), ("wrong sum", None, "the all-reduce gave a wrong sum"), ("", 1e6, "GB/s, less than 1e+06")],
)
def test_pairs_find_faults(fault, min_bandwidth, words):
    first, second = run_distributed(pair, 2, fault, min_bandwidth)
    found = " ".join(first["problems"] + second["problems"])
    assert words in found and bool(found) is bool(words)
    assert abs(first["time"] - second["time"]) < 30 and first["bandwidth_gb_s"] > 0


def test_a_gpu_that_is_not_seen_is_missed():
    assert device_problems(1000) and "GPUs seen, 1000 expected" in device_problems(1000)[0]
