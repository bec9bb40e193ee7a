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


HARDWARE = {
    "h100": Hardware(
        name="NVIDIA H100 SXM",
        peak_flops=989.4 * TFLOPS,
        peak_fp32=66.9 * TFLOPS,
        peak_tf32=494.7 * TFLOPS,
        memory_bytes=80 * GB,
        memory_bandwidth=3350 * GB,
        link_bandwidth=900 * GB,
        network_bandwidth=50 * GB,
        host_bandwidth=63 * GB,
        utilization=0.35,
        source="NVIDIA H100 Tensor Core GPU datasheet (bf16 without sparsity); DGX H100: one 400 Gb/s port per GPU",
    ),
    "h200": Hardware(
        name="NVIDIA H200 SXM",
        peak_flops=989.4 * TFLOPS,
        peak_fp32=66.9 * TFLOPS,
        peak_tf32=494.7 * TFLOPS,
        memory_bytes=141 * GB,
        memory_bandwidth=4800 * GB,
        link_bandwidth=900 * GB,
        network_bandwidth=50 * GB,
        host_bandwidth=63 * GB,
        utilization=0.35,
        source="NVIDIA H200 Tensor Core GPU datasheet (bf16 without sparsity); DGX H200: one 400 Gb/s port per GPU",
    ),
    "a100": Hardware(
        name="NVIDIA A100 SXM 80GB",
        peak_flops=312 * TFLOPS,
        peak_fp32=19.5 * TFLOPS,
        peak_tf32=156 * TFLOPS,
        memory_bytes=80 * GB,
        memory_bandwidth=2039 * GB,
        link_bandwidth=600 * GB,
        network_bandwidth=25 * GB,
        host_bandwidth=31.5 * GB,
        utilization=0.35,
        source="NVIDIA A100 80GB datasheet (bf16 without sparsity); DGX A100: one 200 Gb/s port per GPU",
    ),
    "l40s": Hardware(
        name="NVIDIA L40S",
        peak_flops=362.05 * TFLOPS,
        peak_fp32=91.6 * TFLOPS,
        peak_tf32=183 * TFLOPS,
        memory_bytes=48 * GB,
        memory_bandwidth=864 * GB,
        link_bandwidth=64 * GB,
        network_bandwidth=25 * GB,
        host_bandwidth=31.5 * GB,
        utilization=0.25,
        source="NVIDIA L40S datasheet (bf16 without sparsity; PCIe Gen4 x16, no NVLink); 200 Gb/s port per GPU assumed",
    ),
    "b200": Hardware(
        name="NVIDIA B200 SXM",
        peak_flops=2250 * TFLOPS,
        peak_fp32=75 * TFLOPS,
        peak_tf32=1125 * TFLOPS,
        memory_bytes=180 * GB,
        memory_bandwidth=8000 * GB,
        link_bandwidth=1800 * GB,
        network_bandwidth=50 * GB,
        host_bandwidth=63 * GB,
        utilization=0.35,
        source="NVIDIA DGX B200 datasheet, an eighth of the system (bf16 without sparsity; one 400 Gb/s port per GPU)",
    ),
    "cpu": Hardware(
        name="CPU core (AVX2)",
        peak_flops=0.096 * TFLOPS,
        peak_fp32=0.096 * TFLOPS,
        peak_tf32=0.096 * TFLOPS,
        memory_bytes=4 * GB,
        memory_bandwidth=10 * GB,
        link_bandwidth=10 * GB,
        network_bandwidth=1.25 * GB,
        host_bandwidth=10 * GB,
        utilization=0.2,
        source="two 8-wide fp32 multiply-adds per cycle at 3 GHz; memory, bandwidths and a 10 Gb/s network assumed",
    ),
}


def find_hardware(name: str) -> Hardware:
    """The row of a device.

    Raises:
        ConfigError: if it is not in the table.
    """
    if name.lower() not in HARDWARE:
        raise ConfigError(f"no hardware row {name!r}; known: {', '.join(HARDWARE)}")
    return HARDWARE[name.lower()]
