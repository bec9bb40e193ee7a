"""Learning rates across width: under muP, what a step does to activations and logits does not depend on the width."""

from __future__ import annotations

import math

import pytest
import torch

from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig, MupConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.model import build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.optim.width import scale_learning_rates
from hope_megatron.testing.models import random_batch

WIDTHS = (32, 64, 128)
STEPS = 3


pytestmark = pytest.mark.usefixtures("world_of_one")


def model_config(width: int, mixer: str = "memory", base_width: int | None = None, **changes) -> ModelConfig:
    """Two layers with heads of 16."""
    values = dict(
        vocab_size=64,
        vocab_multiple=16,
        num_layers=2,
        hidden_size=width,
        num_heads=width // 16,
        layer_pattern=(mixer,),
        memory=MemoryConfig(chunk_tokens=8),
        cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=2 * width),)),
        init_std=0.1,
        mup=MupConfig(base_width=base_width) if base_width else None,
    )
    return ModelConfig(**(values | changes))


def optimizer_of(model, name: str, **changes):
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, **changes))
    scale_learning_rates(optimizer, model.model_config.width_multiplier)
    return optimizer


def moved_by_training(config: ModelConfig, optimizer_name: str) -> dict[str, float]:
    """Root mean square of what a few steps change in the input of the head and in the logits."""
    model = build_model(config)
    optimizer = optimizer_of(model, optimizer_name, lr=0.01)
    tokens, targets = random_batch(config, batch_size=4)
    inputs: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        before = model(tokens).logits
    for _ in range(STEPS):
        model(tokens, targets).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model(tokens).logits
    return {
        "hidden": (inputs[-1] - inputs[0]).square().mean().sqrt().item(),
        "logits": (after - before).square().mean().sqrt().item(),
    }


def growth(mixer: str, optimizer: str, base_width: int | None) -> dict[str, float]:
    """Exponent of width in what training moves."""
    moved = [moved_by_training(model_config(width, mixer, base_width), optimizer) for width in WIDTHS]
    x = torch.tensor(WIDTHS).log()
    centred = x - x.mean()
    return {
        name: float((centred * torch.tensor([one[name] for one in moved]).log()).sum() / centred.square().sum())
        for name in moved[0]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_training_moves_activations_and_logits_alike_at_every_width(mixer: str, optimizer: str) -> None:
    """The coordinate check of arXiv 2203.03466, appendix D.1, beside the standard parametrization, which fails it."""
    scaled, standard = growth(mixer, optimizer, base_width=32), growth(mixer, optimizer, base_width=None)
    print(mixer, optimizer, scaled, standard)
    assert abs(scaled["hidden"]) < 0.2
    assert -0.6 < scaled["logits"] < 0.2  # what the random initial embedding adds falls as 1 / sqrt(width)
    assert standard["hidden"] > 0.4 and standard["logits"] > 0.4


def test_groups_hold_every_parameter_once_with_its_rate() -> None:
    model = build_model(model_config(64, base_width=16))
    rates = {"adamw": 1 / 4, "muon": 1 / math.sqrt(4)}
    for name, hidden in rates.items():
        optimizer = optimizer_of(model, name, lr=0.01, vector_lr=0.02, weight_decay=0.1)
        found = {p.optim_name: group for group in optimizer.param_groups for p in group["params"]}
        assert found.keys() == dict(model.named_parameters()).keys()
        expected = {
            "layers.0.mixer.qkv.weight": 0.01 * hidden,
            "layers.0.mlp.levels.0.down.weight": 0.01 * hidden,
            "layers.0.mixer.rates.weight": 0.02 / 4,  # AdamW under every optimizer
            "layers.0.mixer.memories.mem_in": 0.01,
            "layers.0.norm.weight": 0.02,
            "norm.weight": 0.02 / 4,  # it carries the division of the logits
            "embedding.weight": 0.02,
        }
        for parameter, lr in expected.items():
            assert found[parameter]["lr"] == found[parameter]["base_lr"] == pytest.approx(lr), (name, parameter)
        assert all(
            group["lr"] * group["weight_decay"] == pytest.approx(0.1 * (0.02 if group["role"] == "vector" else 0.01))
            for group in optimizer.param_groups
            if group["weight_decay"]
        )


def test_base_width_changes_nothing() -> None:
    plain, base = build_model(model_config(64)), build_model(model_config(64, base_width=64))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), base.parameters(), strict=True))
    tokens, _ = random_batch(plain.model_config)
    assert torch.equal(plain(tokens).logits, base(tokens).logits)
    groups = optimizer_of(plain, "adamw").param_groups, optimizer_of(base, "adamw").param_groups
    assert [group["name"] for group in groups[0]] == [group["name"] for group in groups[1]]
