"""What is kept for backward, and how many chunks backward takes at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.rule import MemoryCompute

TAPE_BYTES = 16 << 30
"""A segment's tape is kept below this. All chunks of a sequence are one segment where that fits: every further one costs some
three hundred launches."""

KEEP_EVERY = 4
"""Where backward computes again: weights between kept ones come back in this many steps of the loop, whatever the length."""

# [C, max(d, h)] tensors alive at the peak of a segment's backward, for each memory in a loop (W1 alone written, or W2 too) and
# for M_mem in the short loop; measured as growth of the process at C = d = h = 64.
_LOOP_UNITS, _LOOP_UNITS_ALL, _CHAIN_UNITS = 65, 112, 35


class Plan(NamedTuple):
    """Both in chunks."""

    keep_every: int
    segment: int

    @classmethod
    def of(cls, form: Form, compute: MemoryCompute, recompute: bool, like: Tensor, h: int) -> Plan:
        """For q, k or v [N, T, d]."""
        N, T, d = like.shape
        keep = compute.keep_every or (KEEP_EVERY if recompute else 1)
        chunk_bytes = N * tape_units(form) * form.C * max(d, h) * like.element_size()
        return cls(keep, max(1, min(T // form.C, TAPE_BYTES // chunk_bytes) // keep) * keep)


def tape_units(form: Form) -> int:
    """[C, max(d, h)] tensors of a chunk that a segment's backward has at once."""
    if form.generates or form.writes_in:
        return form.n * (_LOOP_UNITS_ALL if form.writes_in else _LOOP_UNITS)
    return _CHAIN_UNITS
