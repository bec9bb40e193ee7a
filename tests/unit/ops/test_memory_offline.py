"""The kernels compile for a GPU that is not here. benchmarks/costs/memory_kernels.py has all of them, on five architectures."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from hope_megatron.ops.memory import MemoryRule
from hope_megatron.ops.memory.backends.triton.offline import compiled, launches_of, variants


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_loops_of_hope_w1_stay_in_registers_on_hopper():
    """Over chunks, forward and backward, of M_mem and of the self-memories. Those of `hope` spill more."""
    found = variants(launches_of(MemoryRule(64, written_layers="output"), 64, "bf16_ptx"))
    for name in ("chain", "chain_backward", "bank_chain-self", "bank_chain_backward-self"):
        made = compiled(found[name], "sm_90")
        assert made["spilled_bytes"] <= 64 and made["shared_bytes"] <= 113 * 1024 and made["registers"] <= 255
        assert made["loop_instructions"] > 100
