"""How long a step of the inner descent may be before it overshoots."""

from __future__ import annotations

import functools

_GRID = 256


@functools.cache
def largest_stable_step(chunk: int, momentum: float) -> float:
    """The largest rate at which chunked gradient descent on a curvature of 1 forgets where it began.

    All gradients u of a chunk are taken at its start: per token S <- theta S - eta u, M <- M + S. With equal keys the error
    obeys the same two equations with u = M, and a chunk is a linear map of (M, S). Over its C tokens

        M' = (1 - eta A) M + B S,    S' = -eta D M + theta^C S,

    with D = (1 - theta^C) / (1 - theta), B = theta D, A = (C - B) / (1 - theta). Both eigenvalues lie in the unit circle exactly
    where eta (A (1 + theta^C) - B D) < 2 (1 + theta^C) and eta (B D - A theta^C) < 1 - theta^C (the Jury criterion). Without
    momentum that is 2 / C; with chunks of one token it is 2 (1 + theta), the heavy ball's.

    Args:
        chunk: tokens whose gradients are taken at the same weights.
        momentum: theta may be anything from 0 to this.

    Returns:
        The bound for the worst theta.
    """
    return min(_bound(chunk, momentum * i / _GRID) for i in range(_GRID + 1))


def _bound(chunk: int, theta: float) -> float:
    left = theta**chunk
    D = (1 - left) / (1 - theta)
    B = theta * D
    A = (chunk - B) / (1 - theta)
    alternating = 2 * (1 + left) / (A * (1 + left) - B * D)
    swinging = B * D - A * left  # not positive where momentum is spent within the chunk
    return min(alternating, (1 - left) / swinging) if swinging > 1e-12 else alternating
