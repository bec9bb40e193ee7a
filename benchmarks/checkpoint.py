"""What does a checkpoint cost the training step, and how fast is it written and read?

    python benchmarks/checkpoint.py --json checkpoint.json               # hope_60m on one rank
    python benchmarks/checkpoint.py --model hope_tiny                    # a quicker look

A real engine on one rank trains with M3 and saves in the background while further steps run. Reported: the seconds that
training waits (the copy to host memory, the agreement of ranks, the commit), what the writer costs the steps beside it, and
MB/s of writing and of loading with verification. The first save also allocates the host buffers.

Target: a stall of at most 1 s, or 1 % of the time between two checkpoints.
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

from common import machine, print_table, write_json

from hope_megatron.config import DataConfig, RunConfig, TrainingConfig, load_model_config
from hope_megatron.engine.build import build_engine
from hope_megatron.engine.checkpoint import Checkpointer
from hope_megatron.engine.distributed import init_distributed
from hope_megatron.testing.tiny import RepeatingSource
from hope_megatron.training.batches import BatchReader
from hope_megatron.training.state import TrainingState
from hope_megatron.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope_60m", help="preset (default hope_60m)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints written (default 3)")
    parser.add_argument(
        "--steps", type=int, default=2, help="training steps timed with no save beside them (default 2)"
    )
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per step (default 256)")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    if min(args.saves, args.steps) < 1:
        parser.error("--saves and --steps must be at least 1")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        results = measure(args.model, args.saves, args.steps, args.seq_length, Path(directory))
    print_table(["figure", "value"], [[name, value] for name, value in results.items()])
    write_json(args.json, {"machine": machine(), "arguments": {**vars(args), "directory": None}, **results})


def measure(model_name: str, num_saves: int, num_steps: int, seq_length: int, directory: Path) -> dict[str, float]:
    """Train alone for `num_steps`, then beside the writer of each save; load the last one. Medians, in seconds and MB/s."""
    config = RunConfig(
        name="benchmark",
        model=load_model_config(model_name),
        training=TrainingConfig(steps=1000, seq_length=seq_length, global_batch_size=1, precision="fp32"),
        data=DataConfig(train=Path("train"), tokenizer=Path("tokenizer.model")),
    )
    engine, state = build_engine(config, init_distributed(config.parallel)), TrainingState()
    checkpointer = Checkpointer(engine, directory)
    reader = BatchReader(RepeatingSource(seq_length=seq_length), config, engine.mesh)

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
        started = time.perf_counter()
        path = checkpointer.save_now(description())
        writes.append(time.perf_counter() - started)
        checkpointer.take_stall_s()
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    started = time.perf_counter()
    checkpointer.load(path)
    load_s = time.perf_counter() - started
    reader.close()
    step_s, stall_s = statistics.median(alone), statistics.median(stalls[1:] or stalls)
    return {
        "parameters": float(engine.num_parameters),
        "checkpoint_mb": megabytes,
        "step_s": step_s,
        "step_beside_writer_s": statistics.median(beside),
        "stall_first_save_s": stalls[0],
        "stall_s": stall_s,
        "stall_in_steps": stall_s / step_s,
        "write_mb_per_s": megabytes / statistics.median(writes),
        "load_mb_per_s": megabytes / load_s,
    }


if __name__ == "__main__":
    main()
