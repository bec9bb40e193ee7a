"""What does a checkpoint cost the training step, and how fast is it written and read?

    python benchmarks/checkpoint.py --json checkpoint.json               # hope_60m on one rank
    python benchmarks/checkpoint.py --model hope_tiny --steps 8          # a quicker look

A real engine trains on random tokens with M3. Every second step is followed by an asynchronous save. Reported: the seconds that
the step waits for (the copy to host memory, and the commit), what the writer costs the steps beside it, MB/s of writing and
of loading with verification, each over all bytes of the checkpoint.

Target: a stall of at most 1 s, or 1 % of the time between two checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import machine, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope_60m", help="preset (default hope_60m)")
    parser.add_argument("--steps", type=int, default=6, help="training steps (default 6)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per step (default 256)")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        result = {"machine": machine(), **measure(args.model, args.steps, args.seq_length, Path(directory))}
    for name in ("bytes", "step_s", "step_beside_writer_s", "stall_s", "write_mb_per_s", "load_mb_per_s"):
        print(f"{name:<22} {result[name]:,.3f}")
    if args.json:
        write_json(args.json, result)


def measure(model_name: str, num_steps: int, seq_length: int, directory: Path) -> dict[str, float | str]:
    """Train, save after every second step, and load the last checkpoint."""
    from hope_megatron.config import DataConfig, RunConfig, TrainingConfig, load_model_config
    from hope_megatron.engine.build import build_engine
    from hope_megatron.engine.checkpoint import Checkpointer
    from hope_megatron.engine.distributed import init_distributed
    from hope_megatron.testing.tiny import RepeatingSource
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    config = RunConfig(
        name="benchmark",
        model=load_model_config(model_name),
        training=TrainingConfig(steps=1000, seq_length=seq_length, global_batch_size=1, precision="fp32"),
        data=DataConfig(train=Path("train"), tokenizer=Path("tokenizer.model")),
    )
    engine = build_engine(config, init_distributed(config.parallel))
    checkpointer, state, source = Checkpointer(engine, directory), TrainingState(), RepeatingSource(seq_length=seq_length)
    plain, beside, stalls, writes, writing = [], [], [], [], None
    train_step(engine, source, state, config)  # buffers, caches
    for i in range(num_steps):
        started = time.perf_counter()
        train_step(engine, source, state, config)
        (beside if writing is not None else plain).append(time.perf_counter() - started)
        if writing is None:
            started = time.perf_counter()
            checkpointer.save({"progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {}})
            writing = started
        else:
            path = checkpointer.wait()
            writes.append(time.perf_counter() - writing)
            writing = None
            stalls.append(checkpointer.take_stall_s())
    if writing is not None:
        path = checkpointer.wait()
    size = sum(file.stat().st_size for file in path.iterdir())
    started = time.perf_counter()
    checkpointer.load(path)
    load_s = time.perf_counter() - started
    return {}
