"""The compiled kernel is given nothing that it would read or write beyond.

Run under AddressSanitizer (GCC 12 and later), which sees what a check here would let through:

    CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer" XDG_CACHE_HOME=/tmp/asan ASAN_OPTIONS=detect_leaks=0 \\
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \\
        python -m pytest tests/unit/ops/test_memory_cpu_bounds.py
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, MemoryRuleError, RateLogits, memory_chunked
from hope_megatron.ops.memory.backends.cpu import compiling
from hope_megatron.ops.memory.backends.cpu.calls import Settings, TensorMismatch, call_backward, call_forward

FORWARD = ("q", "x_k", "x_v", "eta", "alpha", "anchor", "y", "w", "kept")
BACKWARD = (
    *FORWARD[:6], "kept", "d_y", "d_q", "d_x_k", "d_x_v", "d_eta", "d_alpha", "d_w", "d_anchor",
)  # fmt: skip
ROWS, RATES = {"q", "x_k", "x_v", "y", "d_y", "d_q", "d_x_k", "d_x_v"}, {"eta", "alpha", "d_eta", "d_alpha"}


@pytest.fixture(autouse=True, scope="module")
def kernel():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine")
    compiling.load()


sizes = st.builds(
    lambda B, H, chunk, chunks, d, h, segment, flags: Settings(
        sequences=B, heads=H, tokens=chunk * chunks, d=d, h=h, chunk=chunk, segment_chunks=segment, residual=flags[0],
        read_skip=flags[1], anchored=flags[2], writes_in=flags[3], eta_max=1.0,
    ),
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 16, 17, 32]), st.integers(1, 4),
    st.sampled_from([16, 32, 48]), st.sampled_from([16, 32, 64]), st.integers(1, 5), st.tuples(*[st.booleans()] * 4),
)  # fmt: skip


def shape_of(name: str, s: Settings) -> tuple[int, ...]:
    if name in ROWS:
        return s.sequences, s.tokens, s.heads, s.d
    if name in RATES:
        return s.sequences, s.tokens, s.heads
    streams = (s.sequences * s.heads, s.weights)
    return (s.segments, *streams) if name == "kept" else streams


def tensors(names: tuple[str, ...], s: Settings) -> dict[str, Tensor | None]:
    absent = () if s.anchored else ("anchor", "d_anchor")
    return {name: None if name in absent else 0.3 * torch.randn(shape_of(name, s)) for name in names}


@settings(max_examples=40, deadline=None)
@given(s=sizes)
def test_any_size_that_it_takes_is_computed(s):
    given_ = tensors(FORWARD, s)
    call_forward(s, **given_)
    back = tensors(BACKWARD, s) | {name: given_[name] for name in (*FORWARD[:6], "kept")}
    call_backward(s, **back)
    assert all(x is None or x.isfinite().all() for x in [*given_.values(), *back.values()])


def spoil(x: Tensor, how: str) -> Any:
    """A tensor that the compiled code would read beyond or misread."""
    changes = {
        "shorter": lambda: x[..., :-1].contiguous(),
        "longer": lambda: torch.cat([x, x[..., :1]], -1),
        "fewer": lambda: x[:-1],
        "flat": lambda: x.flatten(),
        "double": lambda: x.double(),
        "bfloat16": lambda: x.bfloat16(),
        "integers": lambda: x.int(),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "strided": lambda: torch.cat([x, x], -1)[..., ::2],
        "expanded": lambda: x[:1, ..., :1].expand(x.shape),
        "transposed": lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
        "missing": lambda: None,
    }
    return changes[how]()


HOW = ("shorter", "longer", "fewer", "flat", "double", "bfloat16", "integers", "meta", "sparse", "strided", "expanded",
       "transposed", "missing")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(s=sizes, backward=st.booleans(), which=st.integers(0, 14), how=st.sampled_from(HOW))
def test_any_tensor_that_does_not_fit_is_refused(s, backward, which, how):
    names = BACKWARD if backward else FORWARD
    name, values = names[which % len(names)], tensors(names, s)
    if values[name] is None:
        values[name] = torch.randn(shape_of(name, s))  # one that there should not be
    else:
        values[name] = spoil(values[name], how)
    x = values[name]
    if x is None and name == "kept" and not backward:
        return  # forward may be asked to keep nothing
    fits = x is not None and x.layout == torch.strided and x.device.type == "cpu" and x.dtype == torch.float32
    absent = not s.anchored and name in ("anchor", "d_anchor")
    if fits and not absent and x.shape == shape_of(name, s) and x.is_contiguous():
        return  # a single row that is transposed or expanded is as it was
    with pytest.raises(TensorMismatch, match=name):
        (call_backward if backward else call_forward)(s, **values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 24}, "multiples of 16"), ({"h": 8}, "multiples of 16"), ({"d": 1 << 20}, "between 1 and 8192"),
        ({"tokens": 33}, "multiple of chunk"), ({"chunk": 0}, "between 1"), ({"sequences": 0}, "sequences=0"),
        ({"segment_chunks": -1}, "segment_chunks=-1"),
    ],
)  # fmt: skip
def test_sizes_that_it_does_not_know_are_refused(change, message):
    values = dict(
        sequences=1, heads=1, tokens=32, d=16, h=16, chunk=16, segment_chunks=1, residual=True, read_skip=False,
        anchored=False, writes_in=True, eta_max=1.0,
    )  # fmt: skip
    with pytest.raises(TensorMismatch, match=message):
        call_forward(Settings(**(values | change)), **dict.fromkeys(FORWARD))


@pytest.mark.parametrize(("width", "memory"), [(64, 32), (32, 64)])
def test_memories_of_another_width_than_the_inputs_are_refused(width, memory):
    """What used to corrupt the heap, or to give finite garbage."""
    bank = lambda n, o: Bank(torch.randn(2, n, memory, memory), torch.randn(2, n, o, memory))  # noqa: E731
    params = MemoryParams(bank(1, memory), bank(2, memory), bank(2, 1))
    inputs = [torch.randn(1, 64, 2, width) for _ in range(3)]
    with pytest.raises(MemoryRuleError, match=r"params\.mem\.w_in has shape"):
        memory_chunked(*inputs, RateLogits(torch.randn(1, 64, 2), torch.randn(1, 64, 2)), params, MemoryRule())
