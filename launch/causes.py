"""Why an attempt failed, and the nodes that it is put down to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hope_megatron.runtime.failures import CRASH, TRANSIENT, Failure
from launch.hangs import Hang
from launch.step import TaskError


class Cause(NamedTuple):
    """Why an attempt failed."""

    text: str
    kind: str
    bad_nodes: list[str]
    signature: str = ""


def explain_failure(
    failure: Failure | None, hang: Hang | None, errors: Sequence[TaskError], ranks_per_node: int, nodes: Sequence[str]
) -> Cause:
    """Why an attempt failed, and the nodes it is put down to.

    A hang comes first: the watchdog ended the ranks. Then a rank that a signal killed: the others fail because they lost it. A
    node is to blame for hanging and killed ranks and for errors of its GPUs, not for exceptions of the program.
    """

    def node_of(rank: int) -> str:
        return nodes[min(rank // ranks_per_node, len(nodes) - 1)]

    if failure is not None and failure.is_user_error:
        return Cause(failure.message, failure.kind, [])
    if failure is not None and failure.bad_rank is not None:
        return Cause(failure.message, failure.kind, [node_of(failure.bad_rank)])
    if hang is not None:
        node = node_of(hang.rank) if hang.rank is not None else None
        return Cause(hang.text, TRANSIENT, [node] if node else [])
    killed = [error for error in errors if error.by_signal and not error.what.startswith("Terminated")]
    if killed and (failure is None or failure.lost_peer):
        where = f" (phase {failure.phase} of step {failure.step} on the ranks that lost it)" if failure else ""
        return Cause(f"{killed[0]}{where}", TRANSIENT, [killed[0].node])
    if failure is not None:
        node = node_of(failure.rank)
        text = f"rank {failure.rank} on {node}, step {failure.step}, phase {failure.phase}: {failure.last_line}"
        return Cause(text, failure.kind, [node] if "CUDA error" in failure.message else [], failure.signature)
    if errors:
        return Cause(str(errors[0]), CRASH, [], str(errors[0]))
    return Cause("the ranks left without a reason", TRANSIENT, [])
