"""Adapters of libraries compute what PyTorch does: the check that a run makes on its GPU, here with the extensions' arithmetic in
plain PyTorch. `tests/gpu/test_libraries.py` makes it with the real ones."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hope_megatron.ops.libraries import apex, causal_conv1d, checks, flex, pytorch
from hope_megatron.runtime.step_parts import STEP_PARTS

spec = importlib.util.spec_from_file_location("kernels_of_libraries", __file__.replace("test_", "kernels_of_"))
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


@pytest.fixture(autouse=True)
def extensions(monkeypatch):
    """The libraries' kernels in plain PyTorch, for tensors of a CPU."""
    for name, module in kernels.apex_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    interface = SimpleNamespace(causal_conv1d_fn=kernels.causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    monkeypatch.setitem(sys.modules, "causal_conv1d.causal_conv1d_interface", interface)
    for adapter in (apex, causal_conv1d):
        monkeypatch.setattr(adapter, "on_gpu", lambda x: True)


CHECKS = [candidate.check for part in STEP_PARTS.values() for candidate in part.candidates if candidate.check]


@pytest.mark.parametrize("name", [check.rpartition(":")[2] for check in CHECKS])
def test_the_check_of_a_library_finds_it_right(name):
    assert getattr(checks, name)("cpu") is None


def test_the_check_finds_what_is_wrong():
    sys.modules["amp_C"].multi_tensor_adam = lambda *args: kernels.adam(*args[:-2], 0, 0.0)  # no bias correction
    assert "off from PyTorch" in checks.adam_of_apex("cpu")
    sys.modules["amp_C"].multi_tensor_l2norm = lambda *args: (torch.ones(1), torch.empty(0))
    assert checks.clipping_of_apex("cpu") is not None


def test_apex_is_called_and_not_pytorch(monkeypatch):
    """The adapters fall back for tensors that are not on a GPU; here they must not have."""
    for name in ("rms_norm", "adam_update"):
        monkeypatch.setattr(apex.pytorch, name, None)
    assert apex.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5).shape == (2, 8)
    assert apex.adam_update(*(torch.ones(3) for _ in range(3)), (0.9, 0.95), 1e-8, 1).shape == (3,)
    assert apex.CLIPPING.norm([]) == 0


def test_pytorchs_fused_adam_is_adam():
    assert checks.adam(pytorch.fused_adam_update, "cpu") is None


@pytest.mark.parametrize("length", [1, 33])
def test_flex_goes_on_after_keys_seen_before(length):
    q, k, v = (torch.randn(2, heads, size, 16) for heads, size in ((4, length), (2, 40), (2, 40)))
    expected = pytorch.attention(q, k, v, 9)
    torch.testing.assert_close(flex.attention(q, k, v, 9), expected, rtol=1e-5, atol=1e-6)
