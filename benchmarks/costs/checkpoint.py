"""What does a checkpoint cost the training step, and how fast is it written and read?

    python benchmarks/costs/checkpoint.py --json checkpoint.json               # hope_60m on one rank
    python benchmarks/costs/checkpoint.py --model hope_tiny                    # a quicker look

A real engine on one rank and one thread, as `hope train` runs by default, trains with M3 and saves in the background while
further steps run. Reported: the seconds that training waits (the copy to host memory, the agreement of ranks, the commit),
what the writer costs the steps beside it where it has no core to itself, and MB/s of writing and of loading with verification.
The first save also allocates the host buffers and is told apart.

Target: a stall of at most 1 s, or 1 % of the time between two checkpoints (`checkpoint.every`, 500 steps by default).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from hope_megatron.checkpoint.checkpointer import Checkpointer
from hope_megatron.checkpoint.format import list_checkpoints
from hope_megatron.config import DataConfig, RunConfig, TrainingConfig, load_model_config
from hope_megatron.engine.new_engine import build_engine
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.benchmark import machine, print_table, seconds, spread, write_json
from hope_megatron.testing.tiny import RepeatingSource
from hope_megatron.training.batches import BatchReader
from hope_megatron.training.state import TrainingState
from hope_megatron.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope_60m", help="preset (default hope_60m)")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints written beside training (default 4)")
    parser.add_argument(
        "--steps", type=int, default=3, help="training steps timed with no save beside them (default 3)"
    )
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per step (default 256)")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    if min(args.saves, args.steps) < 1:
        parser.error("--saves and --steps must be at least 1")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        results = measure(args.model, args.saves, args.steps, args.seq_length, Path(directory))
    figures = [[name, *([v] if isinstance(v, float) else v.values())] for name, v in results.items()]
    print_table(["figure", "median", "min", "max"], [row + [""] * (4 - len(row)) for row in figures])
    kept = results["stall_s"]["max"] <= 1.0 or results["stall_percent"]["max"] <= 1.0
    print(f"at most 1 s, or 1 % of the time between two checkpoints: {'kept' if kept else 'BROKEN'}")
    write_json(
        args.json, {"machine": machine(), "arguments": {**vars(args), "directory": None}, "kept": kept, **results}
    )


def measure(model_name: str, num_saves: int, num_steps: int, seq_length: int, directory: Path) -> dict[str, Any]:
    """Train alone for `num_steps`, then beside the writer of each save; load the last one. Seconds and MB/s."""
    config = RunConfig(
        name="benchmark",
        model=load_model_config(model_name),
        training=TrainingConfig(steps=1000, seq_length=seq_length, global_batch_size=1, precision="fp32"),
        data=DataConfig(train=Path("train"), tokenizer=Path("tokenizer.model")),
    )
    engine, state = build_engine(config, init_distributed(config.parallel)), TrainingState()
    checkpointer = Checkpointer(engine, directory)
    with BatchReader(RepeatingSource(seq_length=seq_length), config, engine.mesh) as reader:

        def step() -> float:
            started = time.perf_counter()
            train_step(engine, reader, state, config)
            return time.perf_counter() - started

        def description() -> dict[str, Any]:
            config_values = config.model_dump(mode="json")
            return {"progress": state.to_dict(), "config": config_values, "provenance": {}, "data": {}}

        step()  # buffers and caches
        alone = [step() for _ in range(num_steps)]
        stalls, writes, beside = [], [], []
        for _ in range(num_saves):
            checkpointer.save(description())
            while checkpointer.saving:
                beside.append(step())
                checkpointer.poll()
            stalls.append(checkpointer.take_stall_s())
            # what writing takes with nothing beside it
            writes += seconds(lambda: checkpointer.save_now(description()), repeats=1, warmup=0)
            checkpointer.take_stall_s()
    (path, *_) = list_checkpoints(directory)
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    loads = seconds(lambda: checkpointer.load(path), repeats=num_saves, warmup=0)
    step_s = statistics.median(alone)
    later = stalls[1:] or stalls
    return {
        "parameters": float(engine.num_parameters),
        "checkpoint_mb": megabytes,
        "step_s": spread(alone),
        "step_beside_writer_s": spread(beside),
        "stall_first_save_s": stalls[0],
        "stall_s": spread(later),
        "stall_in_steps": spread([stall / step_s for stall in later]),
        "stall_percent": spread([100 * stall / (config.checkpoint.every * step_s) for stall in later]),
        "write_mb_per_s": spread([megabytes / write for write in writes]),
        "load_mb_per_s": spread([megabytes / load for load in loads]),
    }


if __name__ == "__main__":
    main()
