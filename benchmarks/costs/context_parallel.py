"""One training step of a tiny HOPE on one long sequence, on one rank and split over several: loss, and memory per rank.

    python benchmarks/costs/context_parallel.py                            131,072 tokens on 1 and on 4 ranks
    python benchmarks/costs/context_parallel.py --tokens 32768 --ranks 1 2 --json FILE

Memory is the peak of the resident set during the step, less what was resident before it (Linux). Ranks share this machine's cores,
so that times say nothing about a cluster.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hope_megatron.testing.distributed import run_distributed


def step(rank: int, world_size: int, tokens: int, kernel: Any) -> dict[str, Any]:
    """What one rank sees of the step."""
    from hope_megatron.config import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed
    from hope_megatron.testing.tiny import VOCAB_SIZE, RepeatingSource, tiny_run_config
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    config = tiny_run_config(training={"seq_length": tokens, "global_batch_size": 1, "micro_batch_size": 1})
    model = ModelConfig(
        vocab_size=VOCAB_SIZE,
        vocab_multiple=16,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        memory=MemoryConfig(chunk_tokens=64, kernel=kernel),
        cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=64),)),
    )
    parallel = config.parallel.model_copy(update={"context_parallel": world_size})
    config = config.model_copy(update={"model": model, "parallel": parallel})
    engine, state = build_engine(config, init_distributed(config.parallel)), TrainingState()
    with BatchReader(RepeatingSource(seq_length=tokens), config, engine.mesh) as reader:
        before, started = resident_bytes("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        result = train_step(engine, reader, state, config)
        seconds = time.perf_counter() - started
    peak = resident_bytes("VmHWM") - before
    return {"loss": result.loss, "grad_norm": result.grad_norm, "peak_bytes": peak, "seconds": seconds}


def resident_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--kernel", default="torch", help="memory.kernel; the compiled one fills its lanes with few heads"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    for ranks in args.ranks:
        found[ranks] = results = run_distributed(step, ranks, args.tokens, args.kernel, timeout_s=3600)
        peaks = " ".join(f"{one['peak_bytes'] / 2**20:,.0f}" for one in results)
        first = results[0]
        print(
            f"{ranks} ranks: loss {first['loss']:.7f}, gradient norm {first['grad_norm']:.7f}, peak per rank {peaks} MiB, "
            f"{first['seconds']:.0f} s",
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps({"tokens": args.tokens, "kernel": args.kernel, "ranks": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
