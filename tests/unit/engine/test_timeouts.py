"""Time-outs of collectives."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist

from hope_megatron.parallel.distributed import set_group_timeouts


@pytest.mark.usefixtures("world_of_one")
def test_every_group_gets_the_time_out():
    """Those of Megatron-Core, the world's, and what a library has made for itself."""
    dist.new_group([0])
    groups = list(dist.distributed_c10d._world.pg_map)
    before = {group.group_name: timeout_of(group) for group in groups}
    try:
        set_group_timeouts(77)
        assert len(groups) >= 4
        assert {timeout_of(group) for group in groups} == {datetime.timedelta(seconds=77)}
    finally:
        set_group_timeouts(max(before.values()).total_seconds())


def timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """What the group's backend waits at most."""
    return group._get_backend(torch.device("cpu")).options._timeout
