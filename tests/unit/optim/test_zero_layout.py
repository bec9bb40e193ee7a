"""What the DeepSpeed adapter refuses, and its arithmetic. The real wrappers are in the distributed tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.config.matrices.runs import partition_runs, split_runs
from hope_megatron.optim import ZeroLayoutError
from hope_megatron.optim.zero import flat_vectors


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "not a known ZeRO wrapper"),
        ({"zenflow": True, "round_robin_bit16_groups": []}, "ZenFlow"),
        ({"round_robin_bit16_groups": []}, "no attribute 'round_robin_bit16_offsets'"),
        ({"fp32_partitioned_groups_flat": [], "swap_optimizer": True}, "NVMe"),
        (
            {
                "fp32_partitioned_groups_flat": [],
                "swap_optimizer": False,
                "offload_optimizer": True,
                "partial_offload": 0.5,
            },
            "ratio below 1",
        ),
    ],
)
def test_unknown_wrappers_and_features_are_refused(attributes, message):
    with pytest.raises(ZeroLayoutError, match=message):
        flat_vectors(SimpleNamespace(**attributes))


@given(offset=st.integers(0, 50), numel=st.integers(1, 60), partition=st.integers(1, 40))
def test_runs_of_a_cut_vector_cover_the_parameter_once(offset, numel, partition):
    dp_size = -(-(offset + numel) // partition)
    runs = split_runs(offset, numel, partition, dp_size)
    covered = [i for run in runs for i in range(run.shard_start, run.shard_start + run.numel)]
    assert covered == list(range(numel))
    for run in runs:
        assert run.numel > 0 and run.flat_start + run.numel <= partition
        assert run.dp_rank * partition + run.flat_start == offset + run.shard_start


@given(numel=st.integers(1, 60), dp_size=st.integers(1, 9))
def test_runs_of_a_partitioned_parameter_cover_it_once(numel, dp_size):
    partition = -(-numel // dp_size)
    runs = partition_runs(3, partition, numel, dp_size)
    covered = [i for run in runs for i in range(run.shard_start, run.shard_start + run.numel)]
    assert covered == list(range(numel)) and all(run.flat_start == 3 for run in runs)
