"""The optimizers by name. A new one is a class of `optim.base.BoundOptimizer` and a row here."""

from __future__ import annotations

from typing import NamedTuple

from hope_megatron.runtime.registry import Registry


class OptimizerEntry(NamedTuple):
    """What configuration, accounting and construction need to know of an optimizer; no torch.

    Attributes:
        target: module and class.
        help: a line for people who choose.
        matrix_states: fp32 numbers that it keeps per element of a matrix.
        vector_states: the same for everything else.
        settings: keys of the section `optim` that its constructor takes under the same names.
        scales_with_width: whether muP has learning-rate rules for it.
        lr: default of optim.lr, for the first five the best of a grid on text (docs/records/2026-11-24-optimizers.md).
    """

    target: str
    help: str
    matrix_states: int
    vector_states: int
    settings: tuple[str, ...]
    scales_with_width: bool = True
    lr: float = 2e-3


_ADAM = ("betas", "eps")
_MUON = (*_ADAM, "momentum", "nesterov")

OPTIMIZERS: Registry[OptimizerEntry] = Registry(
    "optimizer",
    {
        "m3": OptimizerEntry(
            "hope_megatron.optim.m3:M3",
            "Multi-scale Momentum Muon: a fast and a slow momentum, both orthogonalised",
            4,
            2,
            (*_ADAM, "form", "slow_beta", "slow_period_steps", "slow_weight", "denominator_floor", "stagger"),
            lr=8e-3,
        ),
        "muon": OptimizerEntry("hope_megatron.optim.muon:Muon", "momentum, orthogonalised", 1, 2, _MUON, lr=8e-3),
        "adamuon": OptimizerEntry(
            "hope_megatron.optim.muon:AdaMuon", "Muon with a second moment of its update", 2, 2, _MUON, lr=8e-3
        ),
        "adamw": OptimizerEntry("hope_megatron.optim.elementwise:AdamW", "AdamW on everything", 2, 2, _ADAM),
        "sgd": OptimizerEntry(
            "hope_megatron.optim.elementwise:SGD",
            "gradient descent with averaged momentum",
            1,
            1,
            ("momentum", "nesterov"),
            scales_with_width=False,
        ),
        "dgd": OptimizerEntry(
            "hope_megatron.optim.deep:DGD",
            "Delta Gradient Descent: weights forget along what they learn",
            1,
            2,
            (*_MUON, "delta", "form"),
            scales_with_width=False,
        ),
        "delta_momentum": OptimizerEntry(
            "hope_megatron.optim.deep:DeltaMomentum",
            "momentum written by the delta rule",
            1,
            2,
            (*_ADAM, "momentum", "delta", "form", "momentum_output"),
            scales_with_width=False,
        ),
        "dmgd": OptimizerEntry(
            "hope_megatron.optim.deep:DMGD",
            "Deep Momentum Gradient Descent: momentum is an MLP per matrix",
            2,
            2,
            (*_ADAM, "inner_lr", "inner_decay", "inner_objective", "momentum_output"),
            scales_with_width=False,
        ),
    },
)
