"""What accelerators offer, from their makers' data sheets. The share that a run reaches is an assumption, shown."""

from __future__ import annotations

from dataclasses import dataclass

from hope_megatron.config.base import ConfigError

GB = 1e9
TFLOPS = 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device (a GPU, or a CPU core)."""

    name: str
    peak_flops: float
    """Dense matrix FLOP/s: bf16 on GPUs, fp32 on the CPU core."""
    peak_fp32: float
    """FLOP/s in float32 without tensor cores."""
    peak_tf32: float
    """Dense matrix FLOP/s in TF32; that of float32 where there is none."""
    memory_bytes: float
    """Of the device."""
    memory_bandwidth: float
    """Bytes per second between the device and its memory."""
    link_bandwidth: float
    """Bytes per second and device inside a node, both directions together."""
    network_bandwidth: float
    """Bytes per second and device between nodes, one direction, as the usual reference systems are wired."""
    host_bandwidth: float
    """Bytes per second between the device and its host, one direction: its PCIe link."""
    utilization: float
    """Share of peak_flops that a run is assumed to reach: a round number of well-tuned Transformers, not measured."""
    source: str


def _device(
    name: str,
    bf16: float,
    fp32: float,
    tf32: float,
    memory_gb: float,
    memory_gb_s: float,
    link_gb_s: float,
    network_gb_s: float,
    host_gb_s: float,
    utilization: float,
    source: str,
) -> Hardware:
    """A row of the table: rates in TFLOP/s, sizes in GB, bandwidths in GB/s."""
    return Hardware(
        name=name,
        peak_flops=bf16 * TFLOPS,
        peak_fp32=fp32 * TFLOPS,
        peak_tf32=tf32 * TFLOPS,
        memory_bytes=memory_gb * GB,
        memory_bandwidth=memory_gb_s * GB,
        link_bandwidth=link_gb_s * GB,
        network_bandwidth=network_gb_s * GB,
        host_bandwidth=host_gb_s * GB,
        utilization=utilization,
        source=source,
    )


# fmt: off
HARDWARE = {
    #                                        TFLOP/s: bf16  fp32    tf32   GB  GB/s: own link node  host share
    "h100": _device( "NVIDIA H100 SXM",         989.4,  66.9,  494.7,  80, 3350,  900,   50,   63, 0.35,
        "NVIDIA H100 Tensor Core GPU datasheet (bf16 without sparsity); DGX H100: one 400 Gb/s port per GPU"),
    "h200": _device( "NVIDIA H200 SXM",         989.4,  66.9,  494.7, 141, 4800,  900,   50,   63, 0.35,
        "NVIDIA H200 Tensor Core GPU datasheet (bf16 without sparsity); DGX H200: one 400 Gb/s port per GPU"),
    "a100": _device( "NVIDIA A100 SXM 80GB",      312,  19.5,    156,  80, 2039,  600,   25, 31.5, 0.35,
        "NVIDIA A100 80GB datasheet (bf16 without sparsity); DGX A100: one 200 Gb/s port per GPU"),
    "l40s": _device( "NVIDIA L40S",            362.05,  91.6,    183,  48,  864,   64,   25, 31.5, 0.25,
        "NVIDIA L40S datasheet (bf16 without sparsity; PCIe Gen4 x16, no NVLink); 200 Gb/s port per GPU assumed"),
    "b200": _device( "NVIDIA B200 SXM",          2250,    75,   1125, 180, 8000, 1800,   50,   63, 0.35,
        "NVIDIA DGX B200 datasheet, an eighth of the system (bf16 without sparsity; one 400 Gb/s port per GPU)"),
    "cpu": _device(  "CPU core (AVX2)",         0.096, 0.096,  0.096,   4,   10,   10, 1.25,   10,  0.2,
        "two 8-wide fp32 multiply-adds per cycle at 3 GHz; memory, bandwidths and a 10 Gb/s network assumed"),
}
# fmt: on


def find_hardware(name: str) -> Hardware:
    """The row of a device.

    Raises:
        ConfigError: if it is not in the table.
    """
    if name.lower() not in HARDWARE:
        raise ConfigError(f"no hardware row {name!r}; known: {', '.join(HARDWARE)}")
    return HARDWARE[name.lower()]
