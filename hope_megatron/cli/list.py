"""What can be chosen by name: presets, optimizers, formats, memory backends, suites and more.

Examples:

    hope list                   every kind
    hope list optimizers        one kind, with a line about each entry
    hope list families --json   for programs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.config.optimizers import OPTIMIZERS
from hope_megatron.config.presets import Kind, config_names
from hope_megatron.config.trackers import TRACKERS
from hope_megatron.convert.formats import FORMATS
from hope_megatron.ops.memory_backends import MEMORY_BACKENDS
from hope_megatron.runtime.registry import Registry
from hope_megatron.runtime.step_parts import STEP_PARTS
from hope_megatron.suites.registry import SUITES

REGISTRIES: dict[str, tuple[Registry, str]] = {
    "optimizers": (OPTIMIZERS, "optim.name=NAME"),
    "formats": (FORMATS, "hope export NAME, hope import NAME"),
    "trackers": (TRACKERS, "tracking.sinks=[NAME, ...]"),
    "backends": (
        MEMORY_BACKENDS,
        "what computes the memories, best first; model.memory.kernel=auto takes the first that can",
    ),
    "libraries": (
        STEP_PARTS,
        "parts of a training step; training.libraries.PART=NAME, `hope doctor` says who computes each here",
    ),
    "suites": (SUITES, "hope eval suite NAME"),
}
"""Every registry, and where its names are written."""

FILES: dict[str, tuple[Kind, str]] = {
    "models": ("models", "model=NAME; configs/models"),
    "families": ("families", "model=NAME_SIZE, for example titans_60m; configs/families"),
    "runs": ("runs", "hope train NAME; configs/runs"),
    "clusters": ("clusters", "hope launch --cluster NAME; configs/clusters"),
    "sweeps": ("sweeps", "hope sweep run NAME; configs/sweeps"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join([*REGISTRIES, *FILES])}")
    parser.add_argument("--json", action="store_true", help="print JSON: kind to name to help")


def run(args: argparse.Namespace) -> int:
    """List."""
    kinds = [*REGISTRIES, *FILES]
    if args.kind is not None and args.kind not in kinds:
        raise ModelReferenceError(f"hope list knows {', '.join(kinds)}, not {args.kind!r}")
    found = {kind: _entries(kind) for kind in ([args.kind] if args.kind else kinds)}
    print(json.dumps(found, indent=1) if args.json else "\n\n".join(_table(kind, found[kind]) for kind in found))
    return 0


def _entries(kind: str) -> dict[str, str]:
    if kind in REGISTRIES:
        return {name: entry.help for name, entry in REGISTRIES[kind][0].items()}
    return dict.fromkeys(config_names(FILES[kind][0]), "")


def _table(kind: str, entries: Mapping[str, str]) -> str:
    where = (REGISTRIES[kind] if kind in REGISTRIES else FILES[kind])[1]
    width = max(map(len, entries), default=0)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in entries.items()]
    return "\n".join([f"{kind} ({where})", *lines])
