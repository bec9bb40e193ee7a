"""The kernel compiled for CPUs equals the operator in float64, does not depend on threads, and says why it is missing."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_megatron.ops.memory import (
    Bank,
    MemoryCompute,
    MemoryParams,
    MemoryRule,
    MemoryState,
    RateLogits,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.cpu import compiling
from hope_megatron.ops.memory.backends.cpu.scan import CPU
from hope_megatron.ops.memory.backends.manual.scan import MANUAL

B, H = 2, 2
# Largest difference from float64 over the largest entry: sums of up to a thousand float32 products, some of them through a
# triangular system. PyTorch's float32 operators lie within the same bound.
FLOAT32 = 1e-4


@pytest.fixture(autouse=True)
def kernel():
    """A machine with a compiler must have the kernel: a fallback would test nothing."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine")
    compiling.load()


def make_case(T: int, d: int, h: int, rule: MemoryRule, *, warm: int = 0):
    """Inputs, initial memories and the state after `warm` tokens, in float64."""
    torch.manual_seed(0)
    double = functools.partial(torch.randn, dtype=torch.float64)

    def inputs(T: int):
        q, k, v = (double(B, T, H, d) for _ in range(3))
        return q, k, v, RateLogits(double(B, T, H), double(B, T, H) + 4)

    def bank(n: int, outputs: int) -> Bank:
        return Bank(3 / d**0.5 * double(H, n, h, d), 0.2 * double(H, n, outputs, h))

    params = MemoryParams(bank(1, d), bank(2, d), bank(2, 1))
    state = memory_recurrent(*inputs(warm), params, rule)[1] if warm else None
    return (*inputs(T), params), state


def tensors_of(*trees) -> list[torch.Tensor]:
    found = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, tuple):
            found += tensors_of(*tree)
    return found


def outputs_and_gradients(case, state: MemoryState | None, rule: MemoryRule, dtype: torch.dtype, **options):
    """y, the weights at the end, and the gradients of everything for a fixed functional of those."""
    found: list[torch.Tensor] = []

    def leaf(tree):
        if isinstance(tree, torch.Tensor):
            found.append(tree.to(dtype).clone().requires_grad_())
            return found[-1]
        if isinstance(tree, tuple):
            parts = [leaf(x) for x in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return tree

    arguments, state = leaf(case), leaf(state)
    y, end = options.pop("operator", memory_chunked)(*arguments, rule, state, **options)
    results = tensors_of(y, end.now)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for x in results)
    return [x.detach() for x in results], torch.autograd.grad(loss, found, allow_unused=True)


def largest_difference(case, state, rule, operator, **options) -> float:
    """`operator` in float32 against the written-out form in float64."""
    results = []
    for dtype, chosen in ((torch.float64, {}), (torch.float32, {"operator": operator})):
        outputs, gradients = outputs_and_gradients(case, state, rule, dtype, **options, **chosen)
        results.append([*outputs, *gradients])
    found = 0.0
    for exact, x in zip(*results):
        assert (exact is None) == (x is None)
        if exact is not None:
            found = max(found, ((x.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)).item())
    return found


ZERO = {"decay_to": "zero"}
ANCHORED, FULL = {"decay_to": "initial"}, {"dot_target": "full", "read_skip": True} | ZERO
OUTPUT = {"written_layers": "output"}


@pytest.mark.parametrize(
    "T, chunk, d, h, changes, warm, recompute",
    [
        (9, 1, 16, 16, ANCHORED, 0, True),
        (9, 1, 16, 32, FULL, 7, False),
        (40, 5, 16, 32, ANCHORED, 7, True),
        (75, 16, 32, 16, ZERO, 7, False),
        (75, 16, 16, 16, ANCHORED, 0, False),
        (100, 48, 16, 16, FULL, 0, True),
        (100, 32, 16, 48, ANCHORED, 7, True),
        (135, 64, 48, 48, ANCHORED, 7, False),
        (128, 64, 64, 64, FULL, 0, True),
        (64, 64, 64, 16, ZERO, 0, False),
        (40, 5, 16, 32, OUTPUT | ANCHORED, 7, True),
        (75, 16, 32, 16, OUTPUT | ZERO, 7, False),
        (128, 64, 48, 48, OUTPUT | ANCHORED, 0, False),
        (96, 48, 16, 16, OUTPUT | FULL, 0, True),
    ],
)
def test_the_kernel_equals_float64(T, chunk, d, h, changes, warm, recompute):
    rule = MemoryRule(chunk_tokens=chunk, self_chunk_tokens=chunk, **changes)
    case, state = make_case(T, d, h, rule, warm=warm)
    options = dict(recompute=recompute, compute=MemoryCompute(keep_every=2))
    assert (
        largest_difference(case, state, rule, functools.partial(memory_chunked, backends=(CPU,)), **options) < FLOAT32
    )


def test_pytorchs_operators_lie_within_the_same_bound():
    rule = MemoryRule(chunk_tokens=64, self_chunk_tokens=64)
    assert (
        largest_difference(
            *make_case(130, 64, 64, rule, warm=7), rule, functools.partial(memory_chunked, backends=(MANUAL,))
        )
        < FLOAT32
    )


def test_threads_segments_and_cuts_at_borders_change_no_bit():
    rule = MemoryRule(chunk_tokens=16, self_chunk_tokens=16, decay_to="initial")
    case, _ = make_case(96, 32, 32, rule)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        outputs, gradients = outputs_and_gradients(case, None, rule, torch.float32)
        torch.set_num_threads(3)
        several = outputs_and_gradients(
            case, None, rule, torch.float32, recompute=True, compute=MemoryCompute(keep_every=3)
        )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, [*outputs, *gradients], [*several[0], *several[1]]))

    q, k, v, rates, params = (x if isinstance(x, tuple) else x.float() for x in case)
    params = MemoryParams(*(Bank(*(w.float() for w in bank)) for bank in params))
    state, parts = None, []
    for span in (slice(0, 32), slice(32, 48), slice(48, 96)):
        logits = RateLogits(*(None if r is None else r[:, span].float() for r in rates))
        y, state = memory_chunked(q[:, span], k[:, span], v[:, span], logits, params, rule, state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), outputs[0])


def test_what_is_not_finite_is_not_hidden():
    rule = MemoryRule(chunk_tokens=16, self_chunk_tokens=16)
    for i in range(5):
        case, _ = make_case(32, 16, 16, rule)
        tensors_of(case)[i].view(-1)[0] = torch.nan
        outputs, gradients = outputs_and_gradients(case, None, rule, torch.float32)
        assert not outputs[0].isfinite().all()
        assert not all(x.isfinite().all() for x in gradients)


def test_a_missing_kernel_says_why_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(compiling, "_library", functools.cache(compiling._library.__wrapped__))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(compiling.NoKernel, match=r"no C\+\+ compiler; install one"):
                compiling.library()
    assert len(caplog.records) == 1
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho out of order >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(compiling.NoKernel, match=r"(?s)scan\.cpp.*failed:.*out of order"):
        compiling.load()
    assert not list((tmp_path / "cache" / "hope_megatron").glob("*.so"))


def test_two_processes_build_it_once(tmp_path: Path):
    """Both have it in the end, and nothing else is left."""
    code = "from hope_megatron.ops.memory.backends.cpu.compiling import load; print(load()._name)"
    environment = {**compiling.os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    names = {process.communicate(timeout=120)[0].strip() for process in both}
    (library,) = (tmp_path / "hope_megatron").glob("*.so")
    assert names == {str(library)}
    assert sorted(x.suffix for x in library.parent.iterdir()) == [".lock", ".sha256", ".so"]
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])  # loading this would end the process
    built_again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert built_again.stdout.strip() == str(library) and "is damaged" in built_again.stderr
    assert library.read_bytes() == whole
