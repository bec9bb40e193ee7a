"""Fit the closed forms of `hope plan` to rehearsals: writes hope_megatron/config/step_counts.json.

Kernels and bytes of a layer are linear in a few sizes (config/features.py). They are counted for layers of
several sizes, and solved for. To be run again when a layer or a kernel changes; tests/unit/rehearse holds the result to 2 %.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hope_megatron.config.features import frame_features, layer_features, variant
from hope_megatron.config.planned_run import load_for_plan
from hope_megatron.config.run import RunConfig

OUT = Path(__file__).resolve().parents[1] / "hope_megatron" / "config" / "step_counts.json"
PHASES = ("forward", "recompute", "backward")


VARIANTS = ("", "/single", "/context", "/single/context")


def samples(kind: str, name: str) -> list[RunConfig]:
    """Runs of a variant whose sizes vary independently."""
    batches = (1,) if "single" in name else (2, 4)
    widths = [(128, (64,)), (256, (192, 64)), (192, (320,)), (384, (128, 128, 64)), (256, (512,)), (128, (64, 256))]
    slices = [1] * 12
    if "context" in name:
        widths = [(256, (64,)), (512, (192, 64)), (512, (320,)), (768, (128, 128, 64)), (256, (512,)), (384, (64, 256))]
        slices = [2, 4, 2, 4, 2, 2, 2, 2, 4, 2, 2, 2]  # two heads of a rank at least: one needs fewer copies
    shapes, found = itertools.cycle(itertools.product(batches, (1024, 2048))), []
    for i, ((D, hidden), vocab, cp) in enumerate(zip(widths * 2, itertools.cycle((1024, 2048, 4096)), slices)):
        batch, length = next(shapes)
        found.append(
            load_for_plan(
                "hope_tiny" if kind == "memory" else "transformer_pp_tiny",
                [
                    f"model.hidden_size={D}",
                    f"model.num_heads={D // 64}",
                    f"model.vocab_size={vocab}",
                    f"model.cms.levels={json.dumps([{'hidden_size': h} for h in hidden])}",
                    "model.num_layers=1",
                    "training.steps=1",
                    f"training.seq_length={length if i < 6 else 3072 - length}",
                    f"training.micro_batch_size={batch}",
                    f"training.global_batch_size={batch}",
                    f"parallel.context_parallel={cp}",
                    "training.recompute=layer",
                    *(["model.memory.kernel=triton", "model.memory.chunk_tokens=64"] if kind == "memory" else []),
                ],
            )
        )
    return found


def counted(config: RunConfig, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """(a layer, what is around layers): counts by "phase/family/what"."""
    from hope_megatron.rehearse import rehearse
    from hope_megatron.rehearse.tally import combined

    # of a step only the micro-batches are wanted, and of those the long one
    def steps(stage: Any, _accumulation: int) -> tuple[Any, Any]:
        stage.step([64])  # what is made once
        return None, stage.step([config.training.seq_length])

    rehearse._shallow_steps = steps
    rehearse._whole_steps = lambda *_args: [(None, 1.0)]
    depths, _ = rehearse.rehearse(config, config.parallel.context_parallel)
    one, two = depths.shallow[None][1].passes[0], depths.shallow[kind][1].passes[0]
    return _counts(combined((1, two), (-1, one))), _counts(combined((2, one), (-1, two)))


def _counts(tally: Any) -> dict[str, float]:
    return {
        f"{key[1]}/{key[2]}/{key[0]}": float(value)
        for key, value in tally.items()
        if key[0] in ("kernels", "bytes") and key[1] in PHASES and value
    }


def fitted(rows: list[dict[str, float]], counts: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Coefficients by "phase/family/what" and feature; what is always 0 is left out."""
    names = list(rows[0])
    matrix = np.array([[row[name] for name in names] for row in rows])
    scale = np.abs(matrix).max(0)
    found = {}
    for key in sorted({key for count in counts for key in count}):
        values = np.array([count.get(key, 0.0) for count in counts])
        solution = np.linalg.lstsq(matrix / scale, values, rcond=1e-9)[0] / scale
        missed = np.abs(matrix @ solution - values).max() / max(np.abs(values).max(), 1)
        if missed > 0.005:
            print(f"{key}: off by {missed:.1%}", file=sys.stderr)
        found[key] = {
            name: float(f"{x:.6g}") for name, x in zip(names, solution) if abs(x * scale[names.index(name)]) > 1e-3
        }
    return found


def main() -> None:
    """Fit the variants that are named, or all, and write them beside those that are there."""
    warnings.simplefilter("ignore")
    result: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8"))
    for name in sys.argv[1:] or VARIANTS:
        for kind in ("attention", "memory"):
            configs = samples(kind, name)
            assert {variant(config) for config in configs} == {name}
            layers, frames = zip(*(counted(config, kind) for config in configs))
            result[kind + name] = fitted([layer_features(config, kind) for config in configs], list(layers))
            if kind == "attention":
                result["frame" + name] = fitted([frame_features(config) for config in configs], list(frames))
            print(kind + name, "done", file=sys.stderr, flush=True)
    OUT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
