"""Which form of Newton-Schulz is the cheaper one, and what it costs. Imports nothing: plans are made of it too."""

from __future__ import annotations

from typing import Literal

Form = Literal["auto", "direct", "gram"]

# The Gram form squares the condition number. Two steps lift small singular values far enough for another two or three;
# without this restart it diverges in half precision.
GRAM_RESTART_STEP = 2


def newton_schulz_flops(rows: int, cols: int, steps: int, form: Form = "auto") -> int:
    """Floating-point operations for one matrix (a multiply-add counts as two)."""
    if form == "auto":
        form = preferred_form(rows, cols, steps)
    m, n = min(rows, cols), max(rows, cols)
    if form == "direct":
        return steps * (4 * m * m * n + 2 * m**3)
    segments = [steps] if steps <= GRAM_RESTART_STEP else [GRAM_RESTART_STEP, steps - GRAM_RESTART_STEP]
    # per segment of s steps: X X^T and P X, s squares, s - 1 products of factors, s - 1 congruences of two products
    return sum(4 * m * m * n + 2 * m**3 * (s + 3 * (s - 1)) for s in segments)


def preferred_form(rows: int, cols: int, steps: int) -> Form:
    """The cheaper of the two forms; the Gram form wins from an aspect ratio of about 1.5 on."""
    gram = newton_schulz_flops(rows, cols, steps, "gram")
    return "gram" if gram < newton_schulz_flops(rows, cols, steps, "direct") else "direct"
