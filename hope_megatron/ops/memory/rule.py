"""How memories learn and are read: the one value that configuration, layers, accounting, exports and kernels share.

Nothing here imports torch, so that configuration can use it on a login node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Kernel = Literal["auto", "torch", "phases", "cpu", "triton"]

LONGEST_CHANNEL_CHUNK = 64
"""Tokens of a chunk with rates of channels: exp(64 e^(-1/2)) = 7e16 is what their retention may take away and give back."""


def channel_share(alpha: float) -> float:
    """sigmoid(x) of a channel's retention alpha = exp(-e^(-1/2) sigmoid(x))."""
    return -math.log(alpha) * math.exp(0.5)


_CHANNEL_RATES: Mapping[str, Any] = dict(
    num_layers=1, objective="dot", dgd_layers=("input", "all"), decay_to="zero", decay_erased=False, read="causal"
)


class MemoryRuleError(ValueError):
    """A rule that does not exist, or memories and inputs that do not fit it. The message names the values and the remedy."""

    is_user_error = True


_SOFTMAX_WEIGHTS: Mapping[str, Any] = dict(
    objective=("l2", "huber", "lp"), dgd_layers="none", written_layers="all", own_targets=False, normalize_steps=True
)


@dataclass(frozen=True)
class Bound:
    """Bounds of a number. The rule checks them itself; pydantic finds them through the hook that it looks for."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        schema = handler(source)
        number = schema["schema"] if schema["type"] == "nullable" else schema
        number |= {name: limit for name, limit in vars(self).items() if limit is not None}
        return schema

    def broken_by(self, value: float) -> str | None:
        """What the value should have been, if it is out of bounds."""
        if self.gt is not None and not value > self.gt:
            return f"greater than {self.gt}"
        if self.ge is not None and not value >= self.ge:
            return f"at least {self.ge}"
        return f"less than {self.lt}" if self.lt is not None and not value < self.lt else None


def check_fields(value: Any) -> None:
    """Hold every field of a frozen dataclass against its annotation: Literal, bool, int, float, optional, with bounds.

    Raises:
        MemoryRuleError: naming the field, what was found and what it takes.
    """
    kind = type(value)
    for name, (allowed, bound) in _annotations(kind).items():
        found = getattr(value, name)
        if get_origin(allowed) is Literal:
            if found not in get_args(allowed) or isinstance(found, bool):
                choices = ", ".join(map(_shown, get_args(allowed)))
                raise MemoryRuleError(f"{kind.__name__}: {name}={_shown(found)} is none of {choices}")
            continue
        kinds = get_args(allowed) or (allowed,)
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not (isinstance(found, bool) if bool in kinds else number and (float in kinds or isinstance(found, int))):
            if found is None and type(None) in kinds:
                continue
            names = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise MemoryRuleError(f"{kind.__name__}: {name}={_shown(found)} must be {names}")
        if bound is not None and (text := bound.broken_by(found)) is not None:
            raise MemoryRuleError(f"{kind.__name__}: {name}={_shown(found)} must be {text}")


@functools.cache
def _annotations(kind: type) -> dict[str, tuple[Any, Bound | None]]:
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        annotated = get_origin(hint) is Annotated
        found[name] = (get_args(hint)[0], get_args(hint)[1]) if annotated else (hint, None)
    return found


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class MemoryRule:
    """How the memories of a layer learn and are read (eqs. 83-93). The defaults are HOPE.

    Symbols and equation numbers are those of "Nested Learning" (arXiv 2512.24695).

    Raises:
        MemoryRuleError: for a value that is none of the choices or out of bounds, and for combinations that do not exist.
    """

    chunk_tokens: Annotated[int, Bound(gt=0)] = 32
    """Tokens per chunk of M_mem: its inner gradients are taken at the state that stood at the chunk's start."""
    self_chunk_tokens: Annotated[int | None, Bound(gt=0)] = None
    """Tokens per chunk of the self-memories; None means chunk_tokens. One must divide the other."""
    num_layers: Literal[1, 2] = 2
    """1: a matrix memory, M(x) = W x. 2: M(x) = x + W1 silu(W2 x), eq. 89."""
    objective: Literal["dot", "l2", "huber", "lp"] = "dot"
    """Inner loss: -<M(k), v>; or of r = M(k) - v 0.5 |r|^2, Huber's (quadratic up to |r| = huber_delta, then linear: Yaad,
    arXiv 2504.13173), or the p-norm sum |r_i|^p / p (Moneta, ibid.)."""
    huber_delta: Annotated[float, Bound(gt=0.0)] = 1.0
    """Objective huber: the error beyond which a token's gradient grows no longer."""
    lp_power: Annotated[float, Bound(ge=1.0)] = 3.0
    """Objective lp: p."""
    written_layers: Literal["all", "output"] = "all"
    """Layers that a context changes. "output": W2 stays as training left it, and with it the features of every key, so that a
    second value of a key replaces the first."""
    dgd_layers: Literal["none", "input", "all"] = "all"
    """Layers whose update carries the Delta-Gradient-Descent term W (alpha I - eta k k^T). "input" is eq. 88 read literally;
    "all": the output layer too, keyed by its unit features."""
    decay_erased: bool = False
    """Retention also scales what that term erases, W alpha (I - eta k k^T): the gated delta rule."""
    rates_of: Literal["head", "channel"] = "head"
    """Whether a learning rate and a retention are numbers of a head, or of every channel of its keys, as in RWKV-7
    (arXiv 2503.14456): W (diag(alpha) - k (eta k)^T) + v (eta k)^T, alpha = exp(-e^(-1/2) sigmoid(x)) (matrix memories)."""
    decay_to: Literal["zero", "initial"] = "initial"
    """What retention forgets towards: the learned initial state, W_0 + (W - W_0) alpha, or nothing, W alpha (eq. 88 literally),
    which fades W_0 too, so that contexts longer than the trained ones are read with memories that were never trained."""
    weights: Literal["sum", "softmax"] = "sum"
    """What a memory answers with: what its writes add up to; or row_sum times the softmax of each row of that sum, which retention
    by KL divergence makes of them (Memora, arXiv 2504.13173): W = c softmax(alpha log W - eta grad)."""
    row_sum: Annotated[float, Bound(gt=0.0)] = 8.0
    """Weights softmax: c, what every row of a matrix sums to."""
    own_targets: bool = True
    """Each memory writes its own target M(v) (self-modification). False: the target is v, as in Titans. The two scalar
    memories always write their own."""
    dot_target: Literal["residual", "full"] = "residual"
    """With objective "dot" and a memory with a skip: learn v - k through the layers (residual), or v itself (full, literal)."""
    adaptive_key: bool = True
    """Keys pass through the memory M_k. False: static projections."""
    adaptive_value: bool = True
    """Values pass through the memory M_v."""
    adaptive_query: bool = False
    """Queries pass through a memory M_q. The paper's table 6 finds less perplexity without it."""
    adaptive_eta: bool = True
    """Learning rates get a term from the memory M_eta."""
    adaptive_alpha: bool = True
    """Retention gets a term from the memory M_alpha."""
    normalize_values: bool = True
    """Unit-norm values. Unbounded values diverged in every variant measured."""
    normalize_targets: bool = True
    """Unit-norm own targets (tanh for the two scalar memories): own targets feed back on themselves."""
    normalize_steps: bool = True
    """Two layers, not objective dot: no token's step passes Polyak's, which takes its error to zero. Without it what is learned
    about features and weights lengthens the steps until they overshoot: TTT-MLP was not finite after 350 steps."""
    read: Literal["causal", "chunk_start"] = "causal"
    """Read M_mem as updated up to this very token (dual form), or at the chunk's start (eq. 90 literally)."""
    read_skip: bool = False
    """Whether the output includes the memory's skip connection, q itself."""
    eta_max: Annotated[float, Bound(ge=0.0)] = 1.0
    """Bound of the inner learning rate. 0 silences all writes (the control experiment). Left out where 1 would diverge
    (objective l2, or no DGD on some layer), it is the largest rate that is known to be stable. Above 1 (delta
    rule only) a write can turn what its key holds into its negative, which is what parity takes (arXiv 2411.12537)."""
    momentum_max: Annotated[float, Bound(gt=0.0, lt=1.0)] = 0.9
    """Upper bound of the momentum's decay. The nearer to 1, the lower the largest stable rate on l2."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (text := self.conflict()) is not None:
            raise MemoryRuleError(f"MemoryRule: {text}")

    @property
    def adaptive(self) -> bool:
        """Whether any of the five self-memories exists."""
        return self.num_vector + self.num_scalar > 0

    @property
    def self_chunk(self) -> int:
        """Tokens per chunk of the self-memories, resolved; without any there is one chunk length."""
        return (self.self_chunk_tokens or self.chunk_tokens) if self.adaptive else self.chunk_tokens

    @property
    def period(self) -> int:
        """The longer of the chunk lengths that there are; the shorter one divides it."""
        return max(self.chunk_tokens, self.self_chunk)

    @property
    def num_vector(self) -> int:
        """How many of M_k, M_v and M_q there are."""
        return self.adaptive_key + self.adaptive_value + self.adaptive_query

    @property
    def num_scalar(self) -> int:
        """How many of M_eta and M_alpha there are."""
        return self.adaptive_eta + self.adaptive_alpha

    @property
    def predicts(self) -> bool:
        """Whether the inner gradient depends on what the memory answers: that of "dot" does not."""
        return self.objective != "dot"

    @property
    def writes_input(self) -> bool:
        """Whether there is an input layer and streams change it."""
        return self.num_layers == 2 and self.written_layers == "all"

    @property
    def output_uses_dgd(self) -> bool:
        """A one-layer memory's only layer is its input layer too, so "input" covers it."""
        return self.dgd_layers == "all" or (self.dgd_layers == "input" and self.num_layers == 1)

    @property
    def normalizes_steps(self) -> bool:
        """One-layer memories meet |k|^2 = 1, and the gradient of "dot" does not depend on what it changes."""
        return self.normalize_steps and self.num_layers == 2 and self.predicts

    def conflict(self, section: str = "") -> str | None:
        """Why these values do not go together, and what to do; None if they do. section: what stands before the names of fields."""
        small, large = sorted((self.chunk_tokens, self.self_chunk_tokens or self.chunk_tokens))
        if self.adaptive and large % small:
            return (
                f"{section}chunk_tokens={self.chunk_tokens} and {section}self_chunk_tokens={self.self_chunk_tokens}: "
                f"one must divide the other; for example self_chunk_tokens={small}"
            )
        if self.num_layers == 1 and (self.adaptive or self.own_targets):
            return (
                f"{section}num_layers=1 (a matrix memory) has static projections and external targets; set "
                "adaptive_key, adaptive_value, adaptive_query, adaptive_eta, adaptive_alpha and own_targets to false, "
                "or num_layers=2"
            )
        if self.rates_of == "channel":
            return self._channel_conflict(section)
        if (
            self.weights == "softmax"
            and (text := self.differs(**_SOFTMAX_WEIGHTS) or self._of_self_memories()) is not None
        ):
            return (
                f"{section}weights=softmax is descent in the logarithm of the weights: {text}; set that, or weights=sum"
            )
        return None

    def _of_self_memories(self) -> str | None:
        return "it has adaptive_* memories, it takes none" if self.adaptive else None

    def _channel_conflict(self, section: str) -> str | None:
        """Rates of channels belong to one recurrence, that of RWKV-7."""
        if (text := self.differs(**_CHANNEL_RATES)) is not None:
            return f"{section}rates_of=channel is the delta rule of a matrix memory: {text}; set that, or rates_of=head"
        if self.chunk_tokens > LONGEST_CHANNEL_CHUNK:
            return (
                f"{section}chunk_tokens={self.chunk_tokens} with rates_of=channel: beyond {LONGEST_CHANNEL_CHUNK} tokens a chunk's "
                f"retention leaves the range of float32; set chunk_tokens to at most {LONGEST_CHANNEL_CHUNK}"
            )
        return None

    def differs(self, **wanted: Any) -> str | None:
        """The first field that has none of the wanted values, in words; None if all have. A tuple is a choice."""
        for name, values in wanted.items():
            values = values if isinstance(values, tuple) else (values,)
            if (value := getattr(self, name)) not in values:
                return f"{name}={_shown(value)}, it takes {' or '.join(map(_shown, values))}"
        return None


@dataclass(frozen=True)
class MemoryCompute:
    """How the rule is computed: nothing here changes what a memory learns but by rounding."""

    kernel: Kernel = "auto"
    """What computes the memories: the best there is for the device (auto); PyTorch's operators chunk by chunk (torch) or in
    phases over all chunks, which launch less (phases); the kernel compiled for CPUs; or Triton's. One that cannot take the rule,
    the shape or the device is refused, with the reason."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Operands of products inside the memories: as they are, or rounded to bf16. Sums and the memories themselves are fp32 in both.
    bf16 is for the phases and Triton."""
    keep_every: Annotated[int | None, Bound(gt=0)] = None
    """Weights are kept for backward at the start of every this many chunks; what lies between is computed again. None: chosen by
    the kernel, for the least memory together."""

    def __post_init__(self) -> None:
        check_fields(self)


AUTO = MemoryCompute()
"""What is asked for where nothing else is said."""

Value = TypeVar("Value", MemoryRule, MemoryCompute)


def pick(kind: type[Value], source: Any) -> Value:
    """The rule (or how it is computed) out of anything that has its fields as attributes; what it lacks gets the default."""
    found = {field.name: getattr(source, field.name) for field in fields(kind) if hasattr(source, field.name)}
    return kind(**found)


HOPES_OWN: Mapping[str, Any] = dict(
    num_layers=2, adaptive_key=True, adaptive_value=True, adaptive_query=False, adaptive_eta=True, adaptive_alpha=True,
    objective="dot", dgd_layers="all", decay_erased=False, own_targets=True, normalize_values=True, normalize_targets=True,
    read="causal",
)  # fmt: skip
"""HOPE's own rule, with what it leaves open: the one whose backward is written by hand."""


def why_not_hopes_own(rule: MemoryRule, *, eta: bool, alpha: bool, theta: bool) -> str | None:
    """Why a rule is not HOPE's own, or None if it is.

    Args:
        eta, alpha, theta: which rates there are.
    """
    if (text := rule.differs(**HOPES_OWN)) is not None:
        return text
    if rule.self_chunk != rule.chunk_tokens:
        return f"self_chunk_tokens={rule.self_chunk} is not chunk_tokens={rule.chunk_tokens}"
    if not (eta and alpha) or theta:
        return "it takes rates and retention from data or constants, and no momentum"
    return "eta_max=0 writes nothing" if rule.eta_max == 0 else None
