"""`hope doctor` says of the fabric what /sys says, and nothing more; the trees of /sys are made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_megatron.doctor.fabric import check_fabric


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Two GPUs on two sockets, one RDMA device on the first, its second port down; eth0 up, ib1 down."""
    port = "sys/class/infiniband/mlx5_0/ports"
    files = {
        f"{port}/1/state": "4: ACTIVE",
        f"{port}/1/rate": "400 Gb/sec (4X NDR)",
        f"{port}/1/link_layer": "InfiniBand",
        f"{port}/2/state": "1: DOWN",
        "sys/class/infiniband/mlx5_0/device/numa_node": "0",
        "dev/infiniband/uverbs0": "",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/eth0/operstate": "up",
        "sys/class/net/eth0/speed": "25000",
        "sys/class/net/eth0/device/vendor": "0x15b3",
        "sys/class/net/ib1/operstate": "down",
        "sys/class/net/ib1/speed": "-1",
        "sys/class/net/bonding_masters": "",
        "sys/module/nvidia_peermem/version": "1",
    }
    for number, (node, kind) in enumerate([("0", "0x030200"), ("1", "0x030200"), ("0", "0x060400")]):
        folder = f"sys/bus/pci/devices/0000:{number:02x}:00.0"
        files |= {f"{folder}/vendor": "0x10de", f"{folder}/class": kind, f"{folder}/numa_node": node}
    return write(tmp_path, files)


def lines(root: Path, **environ: str) -> list[str]:
    return [f"{finding.status} {finding.topic}: {finding.text}" for finding in check_fabric(root, environ)]


def test_what_sys_says_is_said(node: Path) -> None:
    assert lines(node) == [
        "ok RDMA: mlx5_0 port 1: 4: ACTIVE, 400 Gb/sec (4X NDR), InfiniBand",
        "warning RDMA: mlx5_0 port 2: 1: DOWN, rate unknown, layer unknown",
        "ok network: eth0 up, 25,000 Mb/s",
        "note network: ib1 down, speed unknown, virtual",
        "note GPU topology: 2 NVIDIA GPUs on the PCI bus, NUMA nodes 0, 1",
        "note GPU topology: 1 RDMA devices, NUMA nodes 0",
        "note GPU topology: no RDMA device on NUMA node 1: their GPUs send through the other socket",
        "ok GPUDirect RDMA: the module nvidia_peermem is loaded",
    ]


def test_an_empty_machine_has_nothing_that_is_ok(tmp_path: Path) -> None:
    found = check_fabric(tmp_path, {})
    assert [finding.topic for finding in found] == ["RDMA", "network", "GPU topology"]
    assert {finding.status for finding in found} == {"note"}


def test_devices_that_a_container_was_not_given(node: Path) -> None:
    (node / "dev/infiniband/uverbs0").unlink()
    assert any("/dev/infiniband has no uverbs" in line for line in lines(node))


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "ok NCCL_SOCKET_IFNAME: eth: eth0, up"),
        ("NCCL_SOCKET_IFNAME", "^ib", "ok NCCL_SOCKET_IFNAME: ^ib: eth0, up"),
        ("NCCL_SOCKET_IFNAME", "=eth", "warning NCCL_SOCKET_IFNAME: =eth names no interface"),
        ("NCCL_SOCKET_IFNAME", "ib", "warning NCCL_SOCKET_IFNAME: ib names ib1, not up"),
        ("GLOO_SOCKET_IFNAME", "eth", "warning GLOO_SOCKET_IFNAME: eth names no interface"),
        ("NCCL_IB_HCA", "mlx5", "ok NCCL_IB_HCA: mlx5: mlx5_0:1, active"),
        ("NCCL_IB_HCA", "=mlx5_0:2", "warning NCCL_IB_HCA: =mlx5_0:2 names mlx5_0:2, not active"),
        (
            "NCCL_IB_HCA",
            "mlx4",
            "warning NCCL_IB_HCA: mlx4 names no RDMA port of this node; there are: mlx5_0:1, mlx5_0:2",
        ),
        ("NCCL_IB_DISABLE", "1", "warning NCCL_IB_DISABLE: 1: NCCL leaves the active RDMA ports unused"),
    ],
)
def test_variables_are_held_against_what_is_there(node: Path, variable: str, value: str, expected: str) -> None:
    (found,) = (line for line in lines(node, **{variable: value}) if variable in line)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<system version='1'/>", "ok NCCL_TOPO_FILE: "),
        ("<graphs/>", "warning NCCL_TOPO_FILE: "),
        ("nothing", "warning NCCL_TOPO_FILE: "),
    ],
)
def test_topology_files(node: Path, text: str, expected: str) -> None:
    path = node / "topology.xml"
    path.write_text(text)
    assert any(line.startswith(expected) and str(path) in line for line in lines(node, NCCL_TOPO_FILE=str(path)))
