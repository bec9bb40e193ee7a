"""What can compute the memories, by name, best first. No torch here: `hope list` and login nodes read it.

A new backend is a module with a `Backend` (memory/backends/registry.py) and a row here. Exported models have a list of their own
(convert/huggingface/model/memory_backends.py).
"""

from __future__ import annotations

from hope_megatron.runtime.registry import Entry, Registry

_BACKENDS = "hope_megatron.ops.memory.backends"

MEMORY_BACKENDS: Registry[Entry] = Registry(
    "memory backend",
    {
        "cpu": Entry(f"{_BACKENDS}.cpu.scan:CPU", "compiled for this CPU; memory.kernel=cpu"),
        "triton": Entry(
            f"{_BACKENDS}.triton.backend:TRITON",
            "Triton kernels, for NVIDIA GPUs, after a check of themselves; memory.kernel=triton",
        ),
        "phases": Entry(
            f"{_BACKENDS}.phases.scan:PHASES", "few launches over all chunks, for GPUs; memory.kernel=phases"
        ),
        "manual": Entry(
            f"{_BACKENDS}.manual.scan:MANUAL", "HOPE's own rule, backward written out; memory.kernel=torch"
        ),
        "autograd": Entry(f"{_BACKENDS}.autograd:AUTOGRAD", "every rule, chunk by chunk; memory.kernel=torch"),
    },
)
