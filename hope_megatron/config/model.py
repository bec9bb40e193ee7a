"""The architecture: mixer (memories or attention) and continuum memory system, per layer.

Equation numbers refer to "Nested Learning" (arXiv 2512.24695).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.descent import largest_stable_step
from hope_megatron.config.levels import AdaptivePeriod as AdaptivePeriod
from hope_megatron.config.levels import CMSLevelConfig as CMSLevelConfig
from hope_megatron.config.levels import PeriodChange as PeriodChange
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, channel_share, pick

Mixer = Literal["memory", "attention"]

_ETA_FACTORS = {"objective", "dgd_layers", "num_layers", "lp_power", "weights", "row_sum"}


class MemoryConfig(Section, MemoryCompute, MemoryRule):
    """The associative memories of a head (eqs. 83-93): what they are, what they learn, and when they are read.

    The defaults are HOPE. RetNet, DeltaNet, TTT and Titans are other settings of the same operator. What the operator itself has to
    know is inherited from its rule (ops/memory/rule.py); the rest is here.
    """

    hidden_size: int | None = Field(default=None, gt=0)
    """Hidden width of a two-layer memory; None means the head width."""
    eta: Literal["data", "fixed"] = "data"
    """Inner learning rate: from the token, or eta_max always (linear attention)."""
    eta_init: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Initial inner learning rate as a fraction of eta_max. At 0.5 text is learnt worse than without any writes."""
    decay: Literal["data", "constant", "retnet", "none"] = "data"
    """Retention alpha: from the token, a learned constant per head, RetNet's fixed 1 - 2^(-5 - head), or 1."""
    alpha_init: float = Field(default=0.999, gt=0.0, lt=1.0)
    """Initial retention per token."""
    momentum: Literal["none", "constant", "data"] = "none"
    """Momentum theta of the inner update: 0, a learned constant per head, or from the token."""
    momentum_init: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Initial theta, below momentum_max."""

    input_scale: float = Field(default=1.0, gt=0.0)
    """Initial std of W2 times sqrt(d). At 1 text, copying and counting are learnt better than at 3
    (docs/records/2026-11-26-suites.md)."""
    output_scale: float = Field(default=0.02, ge=0.0)
    """Initial std of the W1 of M_mem; the other memories start at W1 = 0 (identity)."""
    conv_width: int = Field(default=4, ge=1)
    """Width of the causal depthwise convolution over q, k, v; 1 means none."""
    query_correction: float | None = None
    """Take so much of its key from each query, q - d k, with a learned d per head that begins here: Comba's output correction
    (arXiv 2506.02475). None: queries stay as they are."""
    output_gate: Literal["none", "silu"] = "none"
    """Multiply the output by silu(W x). It kept associative recall from being learnt, hence "none"."""

    @property
    def rule(self) -> MemoryRule:
        """What the operator has to know of it."""
        return pick(MemoryRule, self)

    @property
    def compute(self) -> MemoryCompute:
        """How the operator is asked to compute it."""
        return pick(MemoryCompute, self)

    @property
    def alpha_logit(self) -> float:
        """Initial logit of the retention."""
        share = channel_share(self.alpha_init) if self.rates_of == "channel" else self.alpha_init
        return math.log(share / (1 - share))

    @property
    def keeps_initial(self) -> bool:
        """Whether there is a retention and it spares the learned initial state."""
        return self.decay != "none" and self.decay_to == "initial"

    @property
    def any_chunk(self) -> bool:
        """Whether every chunk length computes the same function: nothing that a write depends on is in the memory."""
        return self.num_layers == 1 and self.objective == "dot" and self.read == "causal"

    @property
    def largest_stable_eta(self) -> float:
        """Bound of eta_max: 2 for the delta rule, which sees the up-to-date weights; else of order 1 / chunk_tokens.

        A delta-rule write multiplies what its unit key holds by alpha - eta, by alpha (1 - eta) with `decay_erased`. Rates up to 1
        keep that within (-1, 1) whatever the retention; rates up to 2 while alpha > eta - 1, or with `decay_erased`.

        The gradients of a chunk are all taken at its start and added up, so that with parallel keys a chunk is one step of
        descent, as long as descent.py says it may be, on a curvature of |k|^2 = 1 (a matrix), of at most 1 (`normalize_steps`),
        or of |silu(W2 k)|^2 and |W1|^2 (two layers without it, together at least 2). Huber's loss bends no more than l2's. With
        weights c softmax(A) a step in A moves W by c (diag(p) - p p^T), whose norm is at most c / 2.
        """
        if self.objective == "dot" and self.output_uses_dgd:
            return 2.0
        if self.objective == "dot" and self.num_layers == 1:
            return math.inf  # linear attention: writes add up and nothing multiplies them
        curvature = 1.0
        if self.predicts and self.num_layers == 2 and not (self.output_uses_dgd or self.normalize_steps):
            curvature = 2 * max(1.0, self.input_scale**2 / 4)  # a unit key's features: about input_scale^2 / 4
        if (
            self.objective == "lp" and self.lp_power > 2
        ):  # its second derivative (p - 1) |r|^(p - 2) at |r| = 2: unit values apart
            curvature *= (self.lp_power - 1) * 2 ** (self.lp_power - 2)
        if self.weights == "softmax":  # a row's step in its weights is that of its logarithms times at most c / 2
            curvature *= self.row_sum / 2
        carried = self.momentum_max if self.predicts and self.momentum != "none" else 0.0
        return largest_stable_step(self.chunk_tokens, carried) / curvature

    @property
    def _why_limited(self) -> str:
        if self.objective == "dot" and self.output_uses_dgd:
            return "above 2 a delta-rule write overshoots its unit key and grows"
        if self.objective == "dot":
            return "without DGD on all layers nothing bounds the writes"
        return (
            "the gradients of a chunk are taken at its start and summed, so that the bound falls as chunks get longer"
        )

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_that_follow(cls, values: Any, handler: ModelWrapValidatorHandler[MemoryConfig]) -> MemoryConfig:
        """Defaults that depend on other settings, so that leaving a part of HOPE out takes one key.

        They do not count as set (`model_fields_set`): when another setting changes, they follow it again.
        """
        if not isinstance(values, dict):
            return handler(values)
        derived: dict[str, Any] = {}
        if values.get("eta") == "fixed":
            derived["adaptive_eta"] = False
        if values.get("decay") in ("none", "retnet"):
            derived["adaptive_alpha"] = False
        if "eta_max" not in values and not _ETA_FACTORS.isdisjoint(values):
            with contextlib.suppress(ValueError):  # where other fields are wrong, validation will say which
                derived["eta_max"] = min(1.0, cls(**derived | values | {"eta_max": 0.0}).largest_stable_eta)
        derived = {name: value for name, value in derived.items() if name not in values}
        model = handler({**values, **derived})
        model.model_fields_set.difference_update(derived)
        return model

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if (text := self.conflict("memory.")) is not None:
            raise ConfigError(text)
        if self.rates_of == "channel":
            self._check_channels()
        if self.adaptive_eta and self.eta == "fixed":
            raise ConfigError(
                "memory.adaptive_eta=true adds to a learned rate, and memory.eta=fixed has none; "
                "set adaptive_eta=false, or eta=data"
            )
        if self.adaptive_alpha and self.decay in ("none", "retnet"):
            raise ConfigError(
                f"memory.adaptive_alpha=true adds to a retention that memory.decay={self.decay} fixes; "
                "set adaptive_alpha=false, or decay=data"
            )
        if self.eta_max > 0 and self.predicts and not self.normalize_values:
            raise ConfigError(
                f"memory.normalize_values=false with objective={self.objective}: with l2 nothing was finite within 100 steps, "
                "whatever the rate; set normalize_values=true"
            )
        if self.eta_max > 0 and self.own_targets and not self.normalize_targets:
            raise ConfigError(
                "memory.normalize_targets=false with own_targets=true feeds what a memory holds back into it, which was not "
                "finite at the first step; set normalize_targets=true, or own_targets=false"
            )
        if self.momentum != "none" and self.momentum_init >= self.momentum_max:
            raise ConfigError(
                f"memory.momentum_init={self.momentum_init:g} is not below momentum_max={self.momentum_max:g}, which bounds it; "
                "lower it, or raise momentum_max"
            )
        if self.eta_max > (limit := self.largest_stable_eta) * (1 + 1e-9):
            raise ConfigError(
                f"memory.eta_max={self.eta_max:g} diverges with objective={self.objective}, dgd_layers={self.dgd_layers}, "
                f"num_layers={self.num_layers}, chunk_tokens={self.chunk_tokens}, input_scale={self.input_scale:g}, "
                f"momentum={self.momentum}: {self._why_limited}; set eta_max to at most {limit:g}, or leave it out"
            )
        return self

    def _check_channels(self) -> None:
        for name, value, wanted in (
            ("eta", self.eta, "data"),
            ("decay", self.decay, "data"),
            ("momentum", self.momentum, "none"),
        ):
            if value != wanted:
                raise ConfigError(
                    f"memory.rates_of=channel takes its rates from the token and has no momentum, found memory.{name}={value}; "
                    f"set {name}={wanted}, or rates_of=head"
                )
        if not 0 < channel_share(self.alpha_init) < 1:
            raise ConfigError(
                f"memory.alpha_init={self.alpha_init:g} with rates_of=channel: a channel keeps at least exp(-e^(-1/2)) = 0.545; "
                "raise it"
            )


class AttentionConfig(Section):
    """Softmax attention (Megatron-Core's), for Transformer++ and Hope-Attention."""

    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key-value heads for grouped-query attention; None means as many as heads."""
    rope_base: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""
    window_tokens: int | None = Field(default=None, gt=0)
    """Sliding window in tokens; None attends to everything before."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values, as Qwen2 does."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys before they are rotated, as Qwen3 does."""
    segment_tokens: int | None = Field(default=None, gt=0)
    """Attend within segments of so many tokens, which an associative memory per layer joins (ARMT, arXiv 2407.04841); None has no
    segments. All layers have attention then."""
    memory_tokens: int = Field(default=16, gt=0)
    """Learned tokens behind every segment, which pass through all layers and write their memories."""
    memory_key_size: int | None = Field(default=None, gt=0)
    """Width of an associative memory's keys per head, of which it makes six times as many features; None means the head width."""

    @property
    def memory_tokens_per_token(self) -> float:
        """Memory tokens for each token of text."""
        return self.memory_tokens / self.segment_tokens if self.segment_tokens else 0.0


class CMSConfig(Section):
    """The MLPs in the place of the Transformer's MLP."""

    levels: tuple[CMSLevelConfig, ...] = Field(min_length=1)
    """Fastest first. One level with period 1 is an ordinary MLP."""
    activation: Literal["swiglu", "silu", "gelu"] = "swiglu"
    """Activation of every level."""
    connection: Literal["sequential", "nested", "independent"] = "sequential"
    """A chain (eq. 73); a chain in which a level's start is learnt in context by the next slower one (eq. 72); or levels that
    see the same input, outputs joined by learned weights (eq. 74)."""
    inner_decay_towards: Literal["start", "zero"] = "start"
    """Where inner weight decay pulls a fast copy: to the weights it started from, or to 0 (literal; it forgets pretraining)."""

    @property
    def learns_in_context(self) -> bool:
        """Whether any level has a clock inside the context."""
        return any(level.ticks for level in self.levels)

    @property
    def inner_segment_tokens(self) -> int:
        """Tokens between two ticks of the fastest clock; a model that learns in context reads this many at a time."""
        return min(level.inner_chunk_tokens for level in self.levels if level.ticks and level.inner_chunk_tokens)

    @model_validator(mode="after")
    def _check(self) -> CMSConfig:
        clocks = [(i, level.inner_chunk_tokens or 0) for i, level in enumerate(self.levels) if level.ticks]
        for (i, fast), (j, slow) in itertools.pairwise(clocks):
            if slow % fast:
                raise ConfigError(
                    f"cms.levels[{i}].inner_chunk_tokens={fast} does not divide cms.levels[{j}].inner_chunk_tokens={slow}; "
                    "levels stand fastest first and each clock divides the next slower one"
                )
            if self.connection == "nested" and self.levels[j].inner_rate_kind == "per_channel":
                raise ConfigError(
                    f"cms.connection=nested steps the start of level {i} with the rate of level {j}, whose channels are others; "
                    f"set cms.levels[{j}].inner_rate_kind to constant or learned"
                )
        if self.connection == "nested" and len(clocks) < 2:
            raise ConfigError(
                f"cms.connection=nested needs two levels with a clock in the context, found {len(clocks)}; set "
                "inner_chunk_tokens and inner_rate on more levels, or connection=sequential"
            )
        return self


class MupConfig(Section):
    """Maximal update parametrization (muP, arXiv 2203.03466, table 8): what is tuned on a narrow model holds on wide ones.

    With m = hidden_size / base_width, matrices whose fan-in grows with the width start with std / sqrt(m) and learn with lr / m
    (AdamW) or lr / sqrt(m) (Muon, AdaMuon, M3: full rank, fixed RMS). Logits are divided by m by the weight of the last norm, which
    starts at 1 / m and learns with lr / m. Embeddings, vectors and the memories' own matrices, which a head's width sizes, keep
    their rate; lr times weight_decay keeps its value everywhere. At base_width nothing changes. Heads are equally wide at all
    sizes (head_size), so that attention's 1 / sqrt(d) is a constant.
    """

    base_width: int = Field(gt=0)
    """hidden_size at which optim.lr and init_std count as they are."""


class ModelConfig(Section):
    """A decoder: embedding, layers (mixer then CMS, each with pre-norm and residual), norm, output head."""

    name: str = "custom"
    """Preset name, for reports."""
    vocab_size: int = Field(gt=0)
    """Number of token ids. Padded inside the model to a multiple of `vocab_multiple`."""
    vocab_multiple: int = Field(default=128, gt=0)
    """The embedding has a multiple of this many rows, so that any tensor-parallel size up to it divides them."""
    num_layers: int = Field(gt=0)
    """Number of layers."""
    hidden_size: int = Field(gt=0)
    """Model width D."""
    num_heads: int = Field(gt=0)
    """Heads per mixer."""
    head_size: int | None = Field(default=None, gt=0)
    """Head width d; None means hidden_size / num_heads."""
    layer_pattern: tuple[Mixer, ...] = Field(default=("memory",), min_length=1)
    """Mixers, repeated over the layers: ("memory",) is HOPE, ("attention",) Transformer++ or Hope-Attention."""
    memory: MemoryConfig = MemoryConfig()
    """The associative memories."""
    attention: AttentionConfig = AttentionConfig()
    """Softmax attention."""
    cms: CMSConfig
    """Continuum memory system."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm."""
    init_std: float = Field(default=0.02, gt=0)
    """Std of the initial weights; projections back into the residual stream are divided by sqrt(2 layers)."""
    mup: MupConfig | None = None
    """Scale initial weights, learning rates and logits with the width; None: standard parametrization."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding matrix."""

    @property
    def head_dim(self) -> int:
        """Head width, resolved."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def width_multiplier(self) -> float:
        """How many times wider than the base of muP; 1 without it."""
        return self.hidden_size / self.mup.base_width if self.mup else 1.0

    @property
    def hidden_init_std(self) -> float:
        """Initial std of matrices whose fan-in grows with the width."""
        return self.init_std / math.sqrt(self.width_multiplier)

    @property
    def memory_hidden(self) -> int:
        """Hidden width of a memory, resolved."""
        return self.memory.hidden_size or self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each layer."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))

    @property
    def associative_key_size(self) -> int:
        """Width of the keys of ARMT's memories, resolved."""
        return self.attention.memory_key_size or self.head_dim

    def _check_segments(self) -> None:
        if "memory" in self.mixers:
            raise ConfigError(
                "attention.segment_tokens puts memory tokens between segments, which layers with memories would read as text; set "
                "layer_pattern=[attention], or leave segment_tokens out"
            )
        if self.cms.learns_in_context:
            raise ConfigError(
                "attention.segment_tokens does not go with levels that learn in context (cms.levels.N.inner_chunk_tokens); leave "
                "one out"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"attention.segment_tokens: values of a memory are hidden_size / num_heads wide, and num_heads={self.num_heads} "
                f"does not divide hidden_size={self.hidden_size}; change one"
            )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.attention.segment_tokens:
            self._check_segments()
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}; set head_size or change one"
            )
        kv = self.attention.num_kv_heads
        if kv is not None and self.num_heads % kv:
            raise ConfigError(f"model.num_heads={self.num_heads} is not divisible by attention.num_kv_heads={kv}")
        if "attention" in self.mixers and self.head_dim % 2:
            raise ConfigError(f"rotary embeddings need an even head width, not {self.head_dim}; set model.head_size")
        return self
