"""What the phases have to know of a rule, for one set of memories that share their chunks."""

from __future__ import annotations

from typing import NamedTuple

from hope_megatron.ops.memory.rule import MemoryRule


class Form(NamedTuple):
    """Memories are stacked in the order eta, alpha, k, v, mem: [n, N, ...], N = B H.

    Scalar memories are matrices with one row that is not zero. A self-memory that the rule does not have is one of zeros: it adds
    nothing, its features are zero, and so are its writes.
    """

    C: int
    """Tokens per chunk."""
    generates: bool
    """The four self-memories are here: keys, values and rates come from weights that change."""
    mem: bool
    """M_mem is here, and is read."""
    writes_in: bool
    """W2 is written too."""
    dgd_in: bool
    dgd_out: bool
    """Layers with the Delta-Gradient-Descent term."""
    unit_keys: bool
    """Output layers are keyed by unit features."""
    l2: bool
    scaled: bool
    """Steps are normalised (`step_scale`)."""
    own: bool
    """Vector memories write their own targets; scalar ones always do."""
    residual: bool
    """The error of a vector memory begins with its key: objective l2, or dot with a residual target."""
    erased: bool
    """Retention scales what is erased too."""
    momentum: bool
    eta_max: float
    low: bool
    """Operands of products are rounded to bf16."""

    @property
    def n(self) -> int:
        """Memories."""
        return 4 * self.generates + self.mem

    @property
    def parts(self) -> int:
        """Tensors of a layer that change: V = W - A, and with momentum S."""
        return 1 + self.momentum

    @property
    def lead(self) -> int:
        """Scalar memories, which come first."""
        return 2 * self.generates

    @property
    def targets(self) -> int:
        """Memories, from the first on, that write their own target."""
        return self.n if self.own else self.lead

    @classmethod
    def of(cls, rule: MemoryRule, C: int, *, generates: bool, mem: bool, momentum: bool, low: bool) -> Form:
        """The form of memories that share chunks of C tokens."""
        return cls(
            C=C,
            generates=generates,
            mem=mem,
            writes_in=rule.writes_input,
            dgd_in=rule.writes_input and rule.dgd_layers != "none",
            dgd_out=rule.output_uses_dgd,
            unit_keys=rule.num_layers == 2 and rule.dgd_layers == "all",
            l2=rule.objective == "l2",
            scaled=rule.normalizes_steps,
            own=rule.own_targets,
            residual=rule.num_layers == 2 and (rule.objective == "l2" or rule.dot_target == "residual"),
            erased=rule.decay_erased and rule.output_uses_dgd,
            momentum=momentum,
            eta_max=rule.eta_max,
            low=low,
        )
