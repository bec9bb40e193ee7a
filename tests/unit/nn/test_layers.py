"""Layers without Megatron-Core compute what the Megatron-Core layers compute, from the same parameters."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from hope_megatron import ContinuumMLP, HopeBlock, NeuralMemory
from hope_megatron.config import ParallelConfig
from hope_megatron.config.base import ConfigError
from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

STATIC = {f"adaptive_{name}": False for name in ("key", "value", "eta", "alpha")}
MEMORIES: dict[str, dict[str, Any]] = {
    "hope": {"chunk_tokens": 8},
    "momentum, gate": {"chunk_tokens": 8, "momentum": "data", "output_gate": "silu", "conv_width": 1},
    "comba": {
        "chunk_tokens": 8,
        "num_layers": 1,
        "dgd_layers": "input",
        "decay_to": "zero",
        "query_correction": 0.5,
        "own_targets": False,
        **STATIC,
    },
    "rwkv7": {
        "chunk_tokens": 8,
        "num_layers": 1,
        "dgd_layers": "input",
        "decay_to": "zero",
        "rates_of": "channel",
        "own_targets": False,
        **STATIC,
    },
    "retnet": {"chunk_tokens": 8, "num_layers": 1, "decay": "retnet", "own_targets": False, **STATIC},
}


def megatron_model(dtype: torch.dtype, **changes: Any) -> LanguageModel:
    init_distributed(ParallelConfig())
    model = build_model(tiny_model(**changes), dtype=dtype, seed=1).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return model


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MEMORIES)
def test_neural_memory_is_the_megatron_mixer(name: str, dtype: torch.dtype) -> None:
    theirs = megatron_model(dtype, memory=MemoryConfig(**MEMORIES[name])).layers[0].mixer
    ours = NeuralMemory(32, 4, **MEMORIES[name]).to(dtype)
    ours.load_state_dict(dict(theirs.named_parameters()), strict=True)
    x = numbers(dtype, 2, 21, 32)
    y, state = ours(x)
    expected, _ = theirs(x.transpose(0, 1))
    # the Megatron-Core layer computes rates in float32
    torch.testing.assert_close(y, expected.transpose(0, 1), atol=1e-6, rtol=1e-6)
    # a stream may be cut anywhere
    first, middle = ours(x[:, :10])
    rest, end = ours(x[:, 10:], middle)
    torch.testing.assert_close(torch.cat((first, rest), 1), y, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0)
    assert end.num_tokens == state.num_tokens == 21
    # and goes on as the rows that are kept
    again, _ = ours(x[:1, 10:], middle.select(torch.tensor([0])).detach())
    torch.testing.assert_close(again, rest[:1], atol=1e-6, rtol=0)


def test_comba_is_its_recurrence() -> None:
    """Comba (arXiv 2506.02475) as flash-linear-attention computes it, fla/layers/comba.py and the recurrence in fla/ops/comba:
    S = S (alpha I - beta k k^T) + beta v k^T, read by the unit vector of q - d k. Values are unit vectors here."""
    torch.manual_seed(0)
    layer = NeuralMemory(16, 2, **MEMORIES["comba"] | {"conv_width": 1}).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, unit = numbers(torch.float64, 2, 21, 16), lambda t: torch.nn.functional.normalize(t, dim=-1)
    q, k, v = torch.nn.functional.silu(layer.qkv(x)).view(2, 21, 3, 2, 8).unbind(2)
    q, k, v = unit(q - layer.constants["correction"][:, None] * k), unit(k), unit(v)
    beta, alpha = torch.sigmoid(layer.rates(x)).view(2, 21, 2, 2).unbind(2)
    state, read = layer.memories.mem_out[:, 0].expand(2, -1, -1, -1), []
    for t in range(21):
        a, b, key = alpha[:, t, :, None, None], beta[:, t, :, None, None], k[:, t, :, None, :]
        state = a * state + b * (v[:, t, :, :, None] - state @ key.mT) @ key
        read.append((state @ q[:, t, :, :, None])[..., 0])
    expected = layer.output(layer.head_norm(torch.stack(read, 1)).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_block_is_the_megatron_layer(mixer: str, dtype: torch.dtype) -> None:
    attention = {"num_kv_heads": 2, "window_tokens": 5, "qkv_bias": True, "qk_norm": True}
    levels = {"hidden_sizes": (24, 16), "update_periods": (1, 4), "connection": "independent"}
    theirs = megatron_model(
        dtype,
        layer_pattern=(mixer,),
        attention=AttentionConfig(**attention),
        cms=CMSConfig(
            levels=(CMSLevelConfig(hidden_size=24), CMSLevelConfig(hidden_size=16, update_period_steps=4)),
            connection="independent",
        ),
    ).layers[0]
    for name, parameter in theirs.named_parameters():
        if name.endswith(("bias", "layernorm.weight")):
            parameter.data.uniform_(0.5, 1.5)
    ours = HopeBlock(
        32, 4, mixer=mixer, memory={"chunk_tokens": 8}, attention=attention, **levels
    ).to(dtype)  # fmt: skip
    ours.load_state_dict(dict(theirs.named_parameters()), strict=True)
    x = numbers(dtype, 2, 13, 32)
    expected = theirs(x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=1e-6)
    first, state = ours(x[:, :6])
    torch.testing.assert_close(torch.cat((first, ours(x[:, 6:], state)[0]), 1), expected, atol=1e-6, rtol=1e-6)
    mlp = ContinuumMLP(32, **levels).to(dtype)
    mlp.load_state_dict(dict(theirs.mlp.named_parameters()), strict=True)
    torch.testing.assert_close(mlp(x), theirs.mlp(x), atol=1e-6, rtol=1e-6)


def test_bad_sizes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="hidden_size=30 is not divisible by num_heads=4"):
        NeuralMemory(30, 4)
    with pytest.raises(ConfigError, match="chunk_token"):
        NeuralMemory(32, 4, chunk_token=8)
    with pytest.raises(ValueError, match="2 hidden_sizes and 1 update_periods"):
        ContinuumMLP(32, (8, 8), update_periods=(1,))
    with pytest.raises(ValueError, match=r"shape \[2, 32\]; expected \[batch, tokens, 32\]"):
        NeuralMemory(32, 4)(torch.zeros(2, 32))


def test_the_front_door_needs_no_megatron() -> None:
    code = (
        "import sys; sys.modules['megatron'] = sys.modules['deepspeed'] = sys.modules['transformers'] = None\n"
        "import hope_megatron; assert 'torch' not in sys.modules\n"
        "from hope_megatron import ContinuumMLP, HopeBlock, NeuralMemory\n"
        "import torch; x = torch.randn(2, 5, 16)\n"
        "y, state = NeuralMemory(dim=16, num_heads=2)(x); assert y.shape == x.shape and state.num_tokens == 5\n"
        "y, state = HopeBlock(dim=16, num_heads=2)(x); assert y.shape == x.shape\n"
        "y.sum().backward()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
