"""The Triton kernels under Triton's interpreter, against the chunk form in float64. It must be on before the first kernel is
declared, so all cases run in one process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.memory.backends.triton.backend import TRITON
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
MATRIX = MemoryRule(chunk_tokens=16, num_layers=1, dgd_layers="input", decay_to="zero", decay_erased=True, **STATIC)
CASES = {
    "hope": (MemoryRule(chunk_tokens=16), 32),
    "hope, towards zero": (MemoryRule(chunk_tokens=16, decay_to="zero"), 16),
    "hope_w1": (MemoryRule(chunk_tokens=16, written_layers="output"), 48),
    "hope_w1, towards zero": (MemoryRule(chunk_tokens=16, written_layers="output", decay_to="zero"), 32),
    "gated deltanet": (MATRIX, 48),
    "retnet": (replace(MATRIX, dgd_layers="none", decay_erased=False), 48),
}


def results(rule: MemoryRule, T: int, dtype: torch.dtype, backend, compute: MemoryCompute) -> dict[str, torch.Tensor]:
    """y, final weights and the gradient of every input, one key coming back."""
    B, H, d = 1, 2, 16
    generator = torch.Generator().manual_seed(0)
    leaves = {}

    def leaf(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        if name == "k":
            x[:, 1::2] = x[:, :1]
        leaves[name] = x.to(dtype).requires_grad_()
        return leaves[name]

    def bank(name: str, n: int, outputs: int) -> Bank | None:
        if n == 0:
            return None
        w_in = leaf(f"{name} w_in", H, n, d, d, scale=1.5 / d**0.5) if rule.num_layers == 2 else None
        return Bank(w_in, leaf(f"{name} w_out", H, n, outputs, d, scale=0.5 / d**0.5))

    q, k, v = (leaf(name, B, T, H, d) for name in "qkv")
    logits = RateLogits(leaf("eta", B, T, H), leaf("alpha", B, T, H, shift=2.0))
    params = MemoryParams(bank("mem", 1, d), bank("vector", rule.num_vector, d), bank("scalar", rule.num_scalar, 1))
    y, state = memory_chunked(q, k, v, logits, params, rule, compute=compute, backends=(backend,))
    found = {"y": y, **{f"end {i}": w for i, w in enumerate(w for b in state.now if b for w in b if w is not None)}}
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for x in found.values()
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found |= {f"d {name}": x for name, x in zip(leaves, gradients) if x is not None}
    return {name: x.detach().double() for name, x in found.items()}


def errors(name: str) -> dict[str, float]:
    """Relative to the norm of each result."""
    rule, T = CASES[name]
    exact = results(rule, T, torch.float64, AUTOGRAD, AUTO)
    found = results(rule, T, torch.float32, TRITON, MemoryCompute(kernel="triton"))
    assert exact.keys() == found.keys()
    return {key: ((found[key] - x).norm() / x.norm()).item() for key, x in exact.items()}


def a_wrong_kernel() -> dict:
    """The check of `hope_w1` with reads that see the future: the table of decay is not masked."""
    from hope_megatron.ops.memory.backends.triton import check
    from hope_megatron.ops.memory.backends.triton.fixed import read

    @triton.jit
    def wrong_decay(later, earlier, STRICT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
        return tl.exp(later[:, None] - earlier[None, :])

    case = case_of(CASES["hope_w1"][0], d=16, h=16, device="cpu")
    found = {"right": check.check(case, check.SMALL)}
    right, read.decay = read.decay, wrong_decay
    found["wrong"] = check.check(case, check.SMALL)
    read.decay = right
    return found


@pytest.fixture(scope="module")
def interpreted():
    """What this file prints when it runs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_exact_under_the_interpreter(name, interpreted):
    assert all(e < 2e-6 for e in interpreted[name].values()), interpreted[name]  # a NaN fails here


def test_the_self_check_finds_a_kernel_that_was_made_wrong(interpreted):
    right, wrong = interpreted["a wrong kernel"]["right"], interpreted["a wrong kernel"]["wrong"]
    assert right["trusted"] and "gradient of scalar w_out" in right["errors"]["one key"]
    assert not wrong["trusted"] and "one key: y is" in wrong["reason"]


def case_of(rule: MemoryRule, **changes) -> Case:
    case = Case(rule, (True, True, False), 4, 64, 64, torch.float32, "cuda", "fp32", True)
    return case._replace(**changes)


@pytest.mark.parametrize(
    "case, words",
    [
        (case_of(MemoryRule(), rates=(True, True, True)), "momentum"),
        (case_of(MemoryRule(objective="l2", eta_max=0.1)), "l2"),
        (case_of(MemoryRule(), d=48), "48"),
        (case_of(MemoryRule(chunk_tokens=256)), "256"),
        (case_of(MemoryRule(), precision="bf16"), "bf16"),
        (case_of(MemoryRule(), device="cpu"), "interpreter"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_take_is_named(case, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in TRITON.why_not(case)


if __name__ == "__main__":
    from hope_megatron.ops.memory.backends.triton.interpreting import hasten

    hasten()
    print(json.dumps({**{name: errors(name) for name in CASES}, "a wrong kernel": a_wrong_kernel()}))
