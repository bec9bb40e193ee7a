"""The cluster file: strict, with messages that name the mistake; every ready file loads and renders."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_megatron.config import ConfigError
from launch.cluster import ClusterConfig, cluster_names, load_cluster, parse_time_limit
from launch.variables import TABLE, job_variables


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", cluster_names())
def test_ready_files_load(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.partition
    assert cluster.ranks_per_node >= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: main", ["partitoin", "partition"]),
        ("gpus_per_node: 8", ["hardware", "h100"]),
        ("{gpus_per_node: 8, hardware: h100, processes_per_node: 4}", ["processes_per_node=4", "one GPU"]),
        ("{time_limit: '00:05:00', stop_before_end_s: 200}", ["stop_before_end_s=200", "00:05:00"]),
        ("time_limit: '24:00'", ["time_limit"]),
        ("partition: 'gpu; rm -rf /'", ["partition"]),
        ("master_ports: [2000, 1000]", ["master_ports"]),
        ("env: {'A B': x}", ["'A B'"]),
        ("scratch: relative", ["scratch"]),
        ("hardware: abacus", ["abacus", "h100"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster(write(tmp_path, text))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("text", ["24:00:00", "'24:00:00'", "1-00:00:00"])
def test_time_limits_need_no_quotes(tmp_path: Path, text: str) -> None:
    assert load_cluster(write(tmp_path, f"time_limit: {text}")).time_limit == text.strip("'")


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean h100_infiniband"):
        load_cluster("h100_infinband")


@pytest.mark.parametrize(("text", "seconds"), [("00:01:05", 65), ("24:00:00", 86400), ("2-03:00:00", 51 * 3600)])
def test_time_limits_are_seconds(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds


def test_every_variable_has_a_reason_and_a_place() -> None:
    assert all(row.reason and row.where in ("gpu", "infiniband", "efa", "interface", "name") for row in TABLE)
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_variables_follow_the_cluster() -> None:
    cpu = ClusterConfig(network_interface="eth0", fabric="infiniband")
    assert {row.name for row in job_variables(cpu, Path("/run"))} == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    efa = ClusterConfig(
        gpus_per_node=8, hardware="h100", fabric="efa", network_interface="^lo", env={"NCCL_DEBUG": "INFO"}
    )
    variables = {row.name: row.value for row in job_variables(efa, Path("/run"))}
    assert variables["FI_PROVIDER"] == "efa"
    assert variables["NCCL_DEBUG"] == "INFO", "the cluster file wins"
    assert variables["NCCL_SOCKET_IFNAME"] == "^lo"
    assert "GLOO_SOCKET_IFNAME" not in variables, "gloo knows no patterns"
    assert "NCCL_IB_TIMEOUT" not in variables
    assert variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "/run/nccl-trace-"
