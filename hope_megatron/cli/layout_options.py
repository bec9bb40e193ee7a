"""--tp, --dp, --zero-stage and --sequence-parallel: another arrangement of ranks."""

from __future__ import annotations

import argparse
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.config.layout import ParallelLayout


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("another layout")
    group.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: as it is)")
    group.add_argument("--dp", type=int, metavar="N", help="data-parallel ranks (default: as many ranks as it has)")
    group.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: as it is)")
    group.add_argument(
        "--sequence-parallel", action="store_true", help="with sequence parallelism (needs --tp 2 or more)"
    )


def asked_layout(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `ParallelLayout.changed`; empty if no other layout was asked for."""
    for option in ("tp", "dp"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ModelReferenceError(f"--{option} {getattr(args, option)} must be at least 1")
    if not args.sequence_parallel and all(value is None for value in (args.tp, args.dp, args.zero_stage)):
        return {}
    return {
        "tensor_parallel": args.tp,
        "data_parallel": args.dp,
        "zero_stage": args.zero_stage,
        "sequence_parallel": args.sequence_parallel,
    }


def changed_layout(args: argparse.Namespace, before: ParallelLayout) -> ParallelLayout:
    """The layout that was asked for, `before` if none was."""
    asked = asked_layout(args)
    return before.changed(**asked) if asked else before
