"""The memory operator compiled for CPUs (scan.py). Importing this package lets fused.py use it."""

from hope_megatron.ops.memory.fused import Kernel, kernels
from hope_megatron.ops.memory.native.scan import fits, native_scan

kernels["cpu"] = Kernel(fits, native_scan)
