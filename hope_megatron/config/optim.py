"""The outer optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from hope_megatron.config.base import Section
from hope_megatron.config.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]  # the registry's names, checked where a file is read


class OptimConfig(Section):
    """M3 and its peers. Matrices get the named optimizer, everything else AdamW with `vector_lr`."""

    name: OptimizerName = "m3"
    """The optimizer of matrix parameters."""
    lr: float = Field(default=OPTIMIZERS["m3"].lr, gt=0)
    """Peak learning rate of matrices. Left out it follows the optimizer: 0.008 for M3, Muon and AdaMuon, 0.002 for the others.
    These are the best of small models in short runs (docs/records/2026-11-24-optimizers.md); larger ones want less."""
    vector_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of embeddings, norms, convolutions, biases and rates (AdamW); None means lr."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of Muon, SGD, DGD and Delta Momentum."""
    nesterov: bool = True
    """Nesterov momentum for Muon, SGD and DGD."""

    trainable: tuple[str, ...] = ()
    """Parameters that change, as patterns of their names: `layers.*.mlp.levels.1.*`. Empty: all. The others stay as they are."""

    form: Literal["ema", "paper"] = "ema"
    """M3, DGD, Delta Momentum: moving averages and a scale-free update (practical), or the paper's form to the letter."""
    slow_beta: float = Field(default=0.9, ge=0, le=1)
    """M3: beta3, decay of the slow momentum."""
    slow_period_steps: int = Field(default=10, gt=0)
    """M3: the slow momentum ticks every this many steps (the paper's f)."""
    slow_weight: float = Field(default=0.5, ge=0)
    """M3: weight of the slow momentum in the update (the paper's a). In runs of 250 steps 0 is as good; 0.5 is for longer ones."""
    denominator_floor: float = Field(default=0.1, gt=0)
    """M3, ema form: added to the root of the second moment, in units of its mean over the matrix; large values leave Muon."""
    stagger: bool = True
    """M3, ema form: spread the slow ticks of different parameters over the slow period, so that all steps cost the same."""

    delta: float = Field(default=0.1, ge=0, le=2)
    """DGD, Delta Momentum: how much is forgotten along the new gradient; the paper's is 1. Delta Momentum: at most 1 + momentum."""
    inner_lr: float = Field(default=0.5, gt=0, le=1)
    """DMGD: learning rate of the MLP that is the momentum."""
    inner_decay: float = Field(default=0.99, ge=0, le=1)
    """DMGD: what that MLP keeps of its weights at every update."""
    inner_objective: Literal["l2", "dot"] = "l2"
    """DMGD: what that MLP learns: to answer gradients with the direction of descent, or to align with it."""
    momentum_output: Literal["identity", "newton_schulz"] = "identity"
    """Delta Momentum, DMGD: what the momentum says is the update, or its polar factor (eq. 52)."""

    ns_steps: int = Field(default=5, gt=0)
    """Newton-Schulz iterations."""
    ns_coefficients: Literal["quintic", "varying", "polar_express"] = "polar_express"
    """Coefficient table of the iteration."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the iteration, and of momentum on its way between ranks; auto: bfloat16 on GPUs, float32 on CPUs."""

    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """Learning rate after warm-up: cosine or linear to min_lr_ratio, constant, or constant then linear decay (wsd)."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear warm-up, in optimizer steps."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: steps of the final decay."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate over the peak."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Clip gradients to this global norm; 0 never clips."""

    @property
    def orthogonal_output(self) -> bool:
        """Whether a deep optimizer's momentum goes through Newton-Schulz."""
        return self.momentum_output == "newton_schulz" and "momentum_output" in OPTIMIZERS[self.name].settings

    @model_validator(mode="after")
    def _rate_of_the_optimizer(self) -> OptimConfig:
        """The default learning rate is that of the optimizer."""
        if "lr" not in self.model_fields_set:
            self.__dict__["lr"] = OPTIMIZERS[self.name].lr  # frozen for others, not yet for this validator
        if self.trainable and self.name == "dmgd":
            raise ValueError(
                "optim.trainable with optim.name=dmgd: its momentum answers gradients of zero too; choose another optimizer"
            )
        if self.name == "delta_momentum" and self.delta > 1 + self.momentum:
            raise ValueError(
                f"optim.delta is {self.delta:g}: above 1 + optim.momentum = {1 + self.momentum:g} what Delta Momentum erases grows"
            )
        return self
