"""What a checkpoint holds, as plain data."""

from __future__ import annotations

from typing import Any

from hope_megatron.checkpoint.find import CheckpointSource


def read_facts(source: CheckpointSource) -> dict[str, Any]:
    """Progress, layout, history, sizes, and every parameter with its states."""
    checkpoint, description = source.checkpoint, source.checkpoint.description
    return {
        "path": str(source.path),
        "files": len(checkpoint.digests),
        "bytes": sum(digest.size for digest in checkpoint.digests.values()),
        "foreign_files": checkpoint.foreign_files(),
        "run": source.config.name,
        "steps": source.config.training.steps,
        "progress": description["progress"],
        "layout": description["layout"],
        "commit": description["provenance"]["commit"],
        "history": list(description.get("history", ())),
        "parameters": {
            name: {"shape": list(record.full_shape(checkpoint.tp_size)), "states": sorted(checkpoint.states(name))}
            for name, record in checkpoint.parameters.items()
        },
    }
