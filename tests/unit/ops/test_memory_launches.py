"""What a layer's memories launch with the Triton kernels: as many kernels for any length. Counted, nothing runs."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked
from hope_megatron.ops.memory.backends.triton.backend import TRITON
from hope_megatron.ops.memory.rule import MemoryCompute
from hope_megatron.testing.launches import CountLaunches

pytest.importorskip("triton", reason="Triton is not installed")

FORWARD, BACKWARD = 60, 160  # of a layer; backward computes forward again, as activation checkpoints do


DESCENT = MemoryRule(
    16, objective="l2", dgd_layers="none", decay_to="zero", own_targets=False, eta_max=0.06, read_skip=True,
    adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False,
)  # fmt: skip
RULES = {
    "hope": MemoryRule(64), "hope_w1": MemoryRule(64, written_layers="output"), "titans": DESCENT, "ttt_mlp": DESCENT
}  # fmt: skip
RATES = {"titans": 3, "ttt_mlp": 1}


def launches(name: str, T: int) -> tuple[int, int]:
    """Of forward, and of forward again and backward, at hope_760m's shape of a head: PyTorch's operators and Triton kernels."""
    from hope_megatron.ops.memory.backends.triton.launching import recorded

    new = lambda *shape: torch.zeros(*shape).requires_grad_()  # noqa: E731
    bank = lambda n, outputs: Bank(new(1, n, 64, 64), new(1, n, outputs, 64))  # noqa: E731
    rule, rates = RULES[name], RATES.get(name, 2)
    own = (bank(2, 64), bank(2, 1)) if rule.adaptive else (None, None)
    params, x = MemoryParams(bank(1, 64), *own), [new(1, T, 1, 64) for _ in range(3)]
    logits, counts = RateLogits(*(new(1, T, 1) if i < rates else None for i in range(3))), []
    taken = TRITON._replace(why_not=lambda case: None)  # nothing runs: `recorded`
    leaves = [*x, *logits[:rates], *(w for b in params if b for w in b)]
    for backward in (False, True):
        with CountLaunches() as counted, recorded() as kernels:
            y = memory_chunked(*x, logits, params, rule, backends=(taken,), recompute=True)[0]
            if backward:
                torch.autograd.grad(y, leaves, torch.ones_like(y))
        counts.append(counted.found + len(kernels))
    return counts[0], counts[1]


@pytest.mark.parametrize("name", RULES)
def test_launches_do_not_depend_on_length(name):
    launches(name, 128)  # constants are made once
    short, long = launches(name, 512), launches(name, 2048)
    assert short == long
    assert long[0] <= FORWARD and long[1] <= BACKWARD, long


def test_streams_whose_programs_wait_for_each_other_go_in_groups_that_run_at_once():
    """Four programs of four warps for each of 100 streams; 264 run at once."""
    from hope_megatron.ops.memory.backends.triton import launching

    with launching.recorded() as found:
        launching.launch_together(launching.kernel(_waits), (100, 4), 7, C=64)
    assert [(x.grid, x.arguments["first"]) for x in found] == [((66, 4), 0), ((34, 4), 66)]


def _waits(chunks, first, C):
    """Stands for a kernel; it is not run."""


def test_an_ignored_keep_every_is_said_once(caplog):
    from hope_megatron.ops.memory.backends.triton import launching, unchecked

    unchecked._say_what_is_kept.cache_clear()
    x = [torch.zeros(1, 32, 1, 16) for _ in range(3)]
    params = MemoryParams(Bank(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)), None, None)
    taken, asked = TRITON._replace(why_not=lambda case: None), MemoryCompute(kernel="triton", keep_every=4)
    with launching.recorded():
        for _ in range(2):
            memory_chunked(
                *x, RateLogits(torch.zeros(1, 32, 1), None, None), params, DESCENT, compute=asked, backends=(taken,)
            )
    said = [record.getMessage() for record in caplog.records if "keep_every" in record.getMessage()]
    assert said == ["memory.keep_every=4 is ignored: the Triton kernels keep weights at every chunk's start"]
