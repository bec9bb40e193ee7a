"""The backend that runs the Triton kernels, once they were found right on this device.

No GPU has run these kernels yet: they are exact under Triton's interpreter and compile for sm_90. So at first use on a device they
are checked against PyTorch (trust.py), and `auto` takes them where they were found right.
"""

from __future__ import annotations

from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.memory.backends.triton.trust import distrust
from hope_megatron.ops.memory.backends.triton.unchecked import UNCHECKED, why_not_taken


def why_not(case: Case) -> str | None:
    """See `Backend.why_not`. At first use on a GPU the kernels are compiled and checked."""
    reason = why_not_taken(case)
    if reason is None and case.device != "cpu":  # the interpreter is what checks are made with
        reason = distrust(case)
    return reason


TRITON = UNCHECKED._replace(why_not=why_not)
