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

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked, memory_packed
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.memory.backends.triton.backend import TRITON
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
DESCENT = dict(objective="l2", dgd_layers="none", decay_to="zero", read_skip=True, **STATIC)
MATRIX = MemoryRule(chunk_tokens=16, num_layers=1, dgd_layers="input", decay_to="zero", decay_erased=True, **STATIC)
CASES = {
    "hope_w1, two chunk lengths": (MemoryRule(chunk_tokens=32, self_chunk_tokens=16, written_layers="output"), 32),
    "hope": (MemoryRule(chunk_tokens=16), 32),
    "hope, towards zero": (MemoryRule(chunk_tokens=16, decay_to="zero"), 16),
    "hope_w1": (MemoryRule(chunk_tokens=16, written_layers="output"), 49),  # a token is left for PyTorch
    "hope_w1, towards zero": (MemoryRule(chunk_tokens=16, written_layers="output", decay_to="zero"), 32),
    "hope_w1, some self-memories": (
        MemoryRule(16, written_layers="output", adaptive_key=False, adaptive_eta=False, normalize_values=False),
        32,
    ),
    "gated deltanet": (MATRIX, 48),
    "retnet": (replace(MATRIX, dgd_layers="none", decay_erased=False), 48),
    "titans": (MemoryRule(4, eta_max=0.4, momentum_max=0.6, **DESCENT), 12),
    "ttt_mlp": (MemoryRule(16, eta_max=0.0625, **DESCENT), 48),
}
RATES = {"titans": ("eta", "alpha", "theta"), "ttt_mlp": ("eta",)}


def results(
    rule: MemoryRule,
    T: int,
    dtype: torch.dtype,
    backend,
    compute: MemoryCompute,
    *,
    d=16,
    H=2,
    keys="one comes back",
    B=1,
    documents=None,
    rates=("eta", "alpha"),
) -> dict[str, torch.Tensor]:
    """y, final weights and momentum (where there is one document) and the gradient of every input."""
    generator = torch.Generator().manual_seed(0)
    leaves = {}

    def leaf(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        if name == "k" and keys != "random":
            x[:, 1::2] = x[:, :1]
        if name in "qk" and keys == "one":
            x[:] = 1.0
        leaves[name] = x.to(dtype).requires_grad_()
        return leaves[name]

    def bank(name: str, n: int, outputs: int) -> Bank | None:
        if n == 0:
            return None
        w_in = leaf(f"{name} w_in", H, n, d, d, scale=1.5 / d**0.5) if rule.num_layers == 2 else None
        return Bank(w_in, leaf(f"{name} w_out", H, n, outputs, d, scale=0.5 / d**0.5))

    q, k, v = (leaf(name, B, T, H, d) for name in "qkv")
    fast = 4.0 if keys == "one" else 0.0
    shifts = {"eta": fast, "alpha": max(2.0, fast), "theta": 0.0}
    logits = RateLogits(*(leaf(x, B, T, H, shift=shifts[x]) if x in rates else None for x in shifts))
    params = MemoryParams(bank("mem", 1, d), bank("vector", rule.num_vector, d), bank("scalar", rule.num_scalar, 1))
    if documents is not None and backend is AUTOGRAD:
        found = {"y": memory_packed(q, k, v, logits, params, rule, documents, compute=MemoryCompute(kernel="torch"))}
    else:
        y, state = memory_chunked(q, k, v, logits, params, rule, compute=compute, backends=(backend,))
        trees = [tree for tree in (state.now, state.momentum) if tree is not None and documents is None]
        ends = [w for tree in trees for b in tree if b for w in b if w is not None]
        found = {"y": y, **{f"end {i}": w for i, w in enumerate(ends)}}
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for x in found.values()
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found |= {f"d {name}": x for name, x in zip(leaves, gradients) if x is not None}
    return {name: x.detach().double() for name, x in found.items()}


def errors(name: str) -> dict[str, float]:
    """Relative to the norm of each result."""
    (rule, T), rates = CASES[name], RATES.get(name, ("eta", "alpha"))
    exact = results(rule, T, torch.float64, AUTOGRAD, AUTO, rates=rates)
    found = results(rule, T, torch.float32, TRITON, MemoryCompute(kernel="triton"), rates=rates)
    assert exact.keys() == found.keys()
    return {key: ((found[key] - x).norm() / x.norm()).item() for key, x in exact.items()}


DOCUMENTS = ("hope", "hope_w1", "ttt_mlp")


def document_errors(name: str) -> dict[str, float]:
    """Two rows of three chunks, the documents of which begin at different ones, read by one launch of each kernel."""
    from hope_megatron.ops.memory.backends.triton.scan import triton_scan

    rule, how = CASES[name][0], dict(B=2, H=1, rates=RATES.get(name, ("eta", "alpha")))
    documents = torch.tensor([[0, 1, 1], [0, 0, 1]]).repeat_interleave(16, 1)
    begins = {16: torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.int8)}

    def scan(tensors, rule, groups, *, compute, recompute):
        return triton_scan(tensors, rule, groups, precision="fp32", begins=begins)

    exact = results(rule, 48, torch.float64, AUTOGRAD, AUTO, documents=documents, **how)
    backend, asked = TRITON._replace(scan=scan), MemoryCompute(kernel="triton")
    found = results(rule, 48, torch.float32, backend, asked, documents=documents, **how)
    return {key: ((found[key] - x).norm() / x.norm()).item() for key, x in exact.items()}


BF16 = {"random": 3e-2, "one": 1e-1}
"""Keys of a stream, and the largest error of any result: bf16 keeps 2^-9."""


def bf16_errors(keys: str) -> dict[str, float]:
    """Of `hope` with operands rounded to bf16, four chunks of 32 tokens at rates near 1."""
    rule, how = MemoryRule(32), dict(d=32, H=1, keys=keys)
    exact = results(rule, 128, torch.float64, AUTOGRAD, AUTO, **how)
    found = results(rule, 128, torch.float32, TRITON, MemoryCompute(kernel="triton", precision="bf16"), **how)
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_begin_anew(name, interpreted):
    found = interpreted[f"documents, {name}"]
    assert all(e < 2e-6 for e in found.values()) and "d mem w_out" in found, found


@pytest.mark.parametrize("keys", BF16)
def test_bf16_keeps_every_gradient(keys, interpreted):
    found = interpreted[f"bf16, {keys}"]
    assert all(e < BF16[keys] for e in found.values()), found
    assert found["y"] > 1e-4  # something was rounded


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
        (case_of(MemoryRule(16, eta_max=0.1, **{**DESCENT, "decay_to": "initial"})), "zero"),
        (case_of(MemoryRule(objective="huber", eta_max=0.1)), "huber"),
        (case_of(MemoryRule(adaptive_query=True)), "adaptive_query"),
        (case_of(MemoryRule(), d=48), "48"),
        (case_of(MemoryRule(chunk_tokens=256)), "256"),
        (case_of(MemoryRule(), device="cpu"), "interpreter"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_take_is_named(case, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in TRITON.why_not(case)


if __name__ == "__main__":
    from hope_megatron.ops.memory.backends.triton.interpreting import prepare_interpreter

    prepare_interpreter()
    found = {name: errors(name) for name in CASES} | {f"bf16, {keys}": bf16_errors(keys) for keys in BF16}
    found |= {f"documents, {name}": document_errors(name) for name in DOCUMENTS}
    print(json.dumps(found | {"a wrong kernel": a_wrong_kernel()}))
