"""What the kernel says of the fabric: RDMA ports, network interfaces, and whether NCCL's variables name any of them.

Everything is read from /sys, /dev and the environment; no GPU, driver or library is asked. A line is "ok" only for what was read
there. Whether the ports reach each other is not to be seen from one node: `hope launch preflight` sends data.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hope_megatron.doctor.finding import NOTE, OK, WARNING, Finding

_GPU_CLASSES = ("0x0300", "0x0302")
_NVIDIA = "0x10de"
_VIRTUAL_TOPOLOGY = "run/nvidia-topologyd/virtualTopology.xml"
"""Where NCCL looks for a topology that a virtual machine's host describes (its documentation, NCCL_TOPO_FILE), under /var."""


class Port(NamedTuple):
    """A port of an RDMA device."""

    device: str
    number: str
    state: str
    rate: str
    layer: str

    @property
    def is_active(self) -> bool:
        return self.state.endswith("ACTIVE")


class Interface(NamedTuple):
    """A network interface that is not the loopback."""

    name: str
    state: str
    speed: str
    is_hardware: bool

    @property
    def text(self) -> str:
        return f"{self.name} {self.state}, {self.speed}" + ("" if self.is_hardware else ", virtual")


def check_fabric(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Findings about the fabric of this node.

    Args:
        root: where sys/, dev/ and var/ are.
        environ: NCCL's and gloo's variables.
    """
    ports, interfaces = list(_ports(root)), list(_interfaces(root))
    return [
        *_check_ports(ports, root),
        *_check_interfaces(interfaces),
        *_check_chosen(ports, interfaces, environ),
        *_check_topology(root, environ),
    ]


def _read(path: Path) -> str:
    """A file of sysfs; "" where it is missing or does not answer (the speed of an interface that is down)."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _ports(root: Path) -> Iterator[Port]:
    for device in _folders(root / "sys/class/infiniband"):
        for port in _folders(device / "ports"):
            state, rate, layer = (_read(port / name) for name in ("state", "rate", "link_layer"))
            yield Port(
                device.name, port.name, state or "state unknown", rate or "rate unknown", layer or "layer unknown"
            )


def _interfaces(root: Path) -> Iterator[Interface]:
    for folder in _folders(root / "sys/class/net"):
        if folder.name == "lo" or not folder.is_dir():  # bonding_masters is a file
            continue
        speed = _read(folder / "speed")
        known = speed.isdigit() and int(speed) > 0
        state = _read(folder / "operstate") or "state unknown"
        yield Interface(
            folder.name, state, f"{int(speed):,} Mb/s" if known else "speed unknown", (folder / "device").exists()
        )


def _check_ports(ports: list[Port], root: Path) -> Iterator[Finding]:
    if not ports:
        yield Finding(
            "RDMA", NOTE, "no InfiniBand or RoCE device in /sys/class/infiniband: nodes would talk over sockets"
        )
        return
    for port in ports:
        text = f"{port.device} port {port.number}: {port.state}, {port.rate}, {port.layer}"
        advice = "" if port.is_active else "ask for the cable, the switch or the subnet manager; `ibstat` says more"
        yield Finding("RDMA", OK if port.is_active else WARNING, text, advice)
    if not any(path.name.startswith("uverbs") for path in _folders(root / "dev/infiniband")):
        yield Finding(
            "RDMA",
            WARNING,
            "the devices are in /sys, but /dev/infiniband has no uverbs: no process here can use them",
            "give the container /dev/infiniband, or load the module ib_uverbs",
        )


def _check_interfaces(interfaces: list[Interface]) -> Iterator[Finding]:
    if not interfaces:
        yield Finding("network", NOTE, "no interface but the loopback in /sys/class/net")
    for interface in interfaces:
        is_up = interface.state == "up"
        yield Finding("network", OK if is_up else NOTE, interface.text)


def _check_chosen(ports: list[Port], interfaces: list[Interface], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that choose among interfaces and ports."""
    up = {interface.name: interface.state == "up" for interface in interfaces} | {"lo": True}
    active = {f"{port.device}:{port.number}": port.is_active for port in ports}
    yield from _check_choice("NCCL_SOCKET_IFNAME", environ, up, _nccl_choice, "interface", "up")
    yield from _check_choice("GLOO_SOCKET_IFNAME", environ, up, _exact_choice, "interface", "up")
    yield from _check_choice("NCCL_IB_HCA", environ, active, _nccl_choice, "RDMA port", "active")
    if environ.get("NCCL_IB_DISABLE", "0") != "0" and any(active.values()):
        yield Finding(
            "NCCL_IB_DISABLE",
            WARNING,
            f"{environ['NCCL_IB_DISABLE']}: NCCL leaves the active RDMA ports unused",
            "unset it, unless that is meant",
        )


def _check_choice(
    variable: str,
    environ: Mapping[str, str],
    candidates: Mapping[str, bool],
    choose: Callable[[str, Mapping[str, bool]], list[str]],
    kind: str,
    good: str,
) -> Iterator[Finding]:
    """Whether a variable names something that is there and works."""
    value = environ.get(variable)
    if not value:
        return
    found, names = choose(value, candidates), ", ".join(sorted(candidates)) or "none"
    if not found:
        yield Finding(
            variable, WARNING, f"{value} names no {kind} of this node; there are: {names}", f"correct {variable}"
        )
    elif working := [name for name in found if candidates[name]]:
        yield Finding(variable, OK, f"{value}: {', '.join(working)}, {good}")
    else:
        yield Finding(
            variable, WARNING, f"{value} names {', '.join(found)}, not {good}", f"name another {kind}, or bring it up"
        )


def _nccl_choice(value: str, candidates: Mapping[str, bool]) -> list[str]:
    """NCCL's syntax: prefixes; "=" whole names; "^" all others; ":port" behind a name."""
    others = value.startswith("^")
    text = value.removeprefix("^")
    exact = text.startswith("=")
    wanted = [part for part in text.removeprefix("=").split(",") if part]
    hit = [name for name in candidates if any(_matches(name, part, exact) for part in wanted)]
    if others:
        return [name for name in candidates if name not in hit and name != "lo"]
    return hit


def _matches(name: str, part: str, exact: bool) -> bool:
    (name, _, number), (part, _, wanted) = name.partition(":"), part.partition(":")
    return (name == part if exact else name.startswith(part)) and wanted in ("", number)


def _exact_choice(value: str, candidates: Mapping[str, bool]) -> list[str]:
    return [name for name in value.split(",") if name in candidates]


def _check_topology(root: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Topology files of NCCL, and on which NUMA nodes GPUs and RDMA devices are."""
    if path := environ.get("NCCL_TOPO_FILE"):
        yield _topology_file("NCCL_TOPO_FILE", Path(path))
    elif (default := root / "var" / _VIRTUAL_TOPOLOGY).exists():
        yield _topology_file("topology file", default)
    gpus = [folder for folder in _folders(root / "sys/bus/pci/devices") if _is_gpu(folder)]
    if not gpus:
        yield Finding("GPU topology", NOTE, "no NVIDIA GPU on the PCI bus of this node")
        return
    nodes, devices = _numa_nodes(gpus), [path / "device" for path in _folders(root / "sys/class/infiniband")]
    yield Finding("GPU topology", NOTE, f"{len(gpus)} NVIDIA GPUs on the PCI bus, NUMA nodes {', '.join(nodes)}")
    if not devices:
        return
    near = _numa_nodes(devices)
    yield Finding("GPU topology", NOTE, f"{len(devices)} RDMA devices, NUMA nodes {', '.join(near)}")
    if far := sorted(set(nodes) - set(near) - {"unknown"}):
        yield Finding(
            "GPU topology",
            NOTE,
            f"no RDMA device on NUMA node {', '.join(far)}: their GPUs send through the other socket",
        )
    yield _peer_memory(root)


def _is_gpu(folder: Path) -> bool:
    return _read(folder / "vendor") == _NVIDIA and _read(folder / "class").startswith(_GPU_CLASSES)


def _numa_nodes(devices: list[Path]) -> list[str]:
    """The NUMA node of each; -1 means that the firmware does not say."""
    found = (_read(device / "numa_node") for device in devices)
    return [node if node.isdigit() else "unknown" for node in found]


def _peer_memory(root: Path) -> Finding:
    """The module by which RDMA devices read GPU memory; newer kernels do it through DMA-BUF, which /sys does not show."""
    for module in ("nvidia_peermem", "nv_peer_mem"):
        if (root / "sys/module" / module).is_dir():
            return Finding("GPUDirect RDMA", OK, f"the module {module} is loaded")
    return Finding(
        "GPUDirect RDMA",
        NOTE,
        "nvidia_peermem is not loaded; whether DMA-BUF takes its place is not to be seen here",
        "modprobe nvidia_peermem, or look for `GPU Direct RDMA` in the output under NCCL_DEBUG=INFO",
    )


def _topology_file(topic: str, path: Path) -> Finding:
    try:
        tag = ElementTree.fromstring(path.read_bytes()).tag
    except (OSError, ElementTree.ParseError) as error:
        return Finding(
            topic, WARNING, f"{path} cannot be read: {error}", "name NCCL's XML file, or unset NCCL_TOPO_FILE"
        )
    if tag != "system":
        return Finding(
            topic, WARNING, f"{path} begins with <{tag}>, not <system>: no topology of NCCL's", "name NCCL's XML file"
        )
    return Finding(topic, OK, f"{path} is read as NCCL's <system>; its contents were not compared with this node")
