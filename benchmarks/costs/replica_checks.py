"""What watching the ranks costs a step: comparing replicas, replaying a micro-batch, timing stragglers. And false alarms.

    python benchmarks/costs/replica_checks.py                     costs at two sizes, on 2 ranks
    python benchmarks/costs/replica_checks.py --alarms 10000      a tiny run of so many steps, compared in every one of them
    python benchmarks/costs/replica_checks.py --reduction         training.reduction=canonical beside the usual reduction

Everything is timed in turn within one run, so that a ratio does not depend on what else the machine does. The shares are those at
the default `resilience.replicas.every`, in the worst case of one micro-batch a step, and with four.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, write_json
from hope_megatron.testing.distributed import run_distributed

RANKS = 2
SIZES = {"small": (128, 2, 256), "larger": (512, 4, 256)}
"""Hidden size, layers, tokens per sequence."""
STRAGGLER_STEPS = 25


def sized(size: str, micro_batches: int, zero_stage: int = 1, reduction: str = "fast") -> Any:
    """A run of one of the two sizes."""
    from hope_megatron.config import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
    from hope_megatron.testing.tiny import VOCAB_SIZE, tiny_run_config

    hidden, layers, tokens = SIZES[size]
    model = ModelConfig(
        vocab_size=VOCAB_SIZE,
        vocab_multiple=16,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=hidden // 64,
        memory=MemoryConfig(chunk_tokens=64),  # type: ignore[call-arg]
        cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=2 * hidden),)),
    )
    training = {
        "seq_length": tokens,
        "micro_batch_size": 1,
        "global_batch_size": RANKS * micro_batches,
        "steps": 10_000,
        "reduction": reduction,
    }
    return tiny_run_config(zero_stage=zero_stage, training=training).model_copy(update={"model": model})


def checks(rank: int, world_size: int, size: str, micro_batches: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, and of what is done beside some steps."""
    from hope_megatron.testing.tiny import RepeatingSource
    from hope_megatron.testing.training import build
    from hope_megatron.training.batches import BatchReader, rank_samples
    from hope_megatron.training.batches import micro_batches as batches_of
    from hope_megatron.training.replicas import Replay, check_replicas
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    config = sized(size, micro_batches)
    source = RepeatingSource(seq_length=config.training.seq_length)
    engine, state = build(config), TrainingState()
    replay = Replay(engine)
    taken: dict[str, list[float]] = {name: [] for name in ("step", "compare", "replay", "gather", "clock")}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        engine.control.maximum([0])  # all ranks begin together
        began = time.perf_counter()
        result = action()
        taken[name].append(time.perf_counter() - began)
        return result

    def replayed(count: int) -> None:
        owner = replay.owner(count)
        numbers = rank_samples(state.samples, config.training.global_batch_size, owner, world_size)[:1]
        ((tokens, targets),) = batches_of(source, numbers, 1, engine.mesh.device)
        replay.before_step(owner, tokens, targets, None)

    with BatchReader(source, config, engine.mesh) as reader:
        for _ in range(2):
            train_step(engine, reader, state, config)
        for count in range(repeats):
            timed("replay", partial(replayed, count))
            timed("step", lambda: train_step(engine, reader, state, config))
            before = len(taken["replay"])
            timed("replay", replay.after_step)
            taken["replay"][before - 1] += taken["replay"].pop()
            timed("compare", lambda: check_replicas(engine))
            timed("gather", lambda: engine.control.gather(1.0))
            timed("clock", lambda: [time.monotonic() for _ in range(3)])  # what every step reads for its own time
    return {"parameters": engine.num_parameters, **{name: sorted(values) for name, values in taken.items()}}


def reduction(rank: int, world_size: int, size: str, micro_batches: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step at ZeRO stage 0 with either reduction, in turn."""
    from hope_megatron.testing.tiny import RepeatingSource
    from hope_megatron.testing.training import build
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    taken: dict[str, list[float]] = {"fast": [], "canonical": []}
    runs = {}
    for name in taken:
        config = sized(size, micro_batches, zero_stage=0, reduction=name)
        engine = build(config)
        reader = BatchReader(RepeatingSource(seq_length=config.training.seq_length), config, engine.mesh)
        runs[name] = engine, reader.__enter__(), TrainingState(), config
    for count in range(2 + repeats):
        for name, (engine, reader, state, config) in runs.items():
            engine.control.maximum([0])
            began = time.perf_counter()
            train_step(engine, reader, state, config)
            if count > 1:
                taken[name].append(time.perf_counter() - began)
    for _, reader, _, _ in runs.values():
        reader.__exit__(None, None, None)
    return {"parameters": engine.num_parameters, **{name: sorted(values) for name, values in taken.items()}}


def alarms(rank: int, world_size: int, steps: int, folder: str) -> dict[str, Any]:
    """A run in which every step is compared and replayed; an alarm ends it."""
    from hope_megatron.config.resilience import ReplicaConfig, ResilienceConfig
    from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
    from hope_megatron.training import watch
    from hope_megatron.training.run import run_training

    config = tiny_run_config(
        output_dir=folder,
        training={"steps": steps, "global_batch_size": RANKS, "log_every": 100, "memory_every": 0},
        checkpoint={"every": 1000, "keep_last": 1},
        optim={"lr": 1e-3},
    )
    rules = ResilienceConfig(replicas=ReplicaConfig(every=1))
    counts = {"compared": 0, "replayed": 0}
    watch.check_replicas = counted(counts, "compared", watch.check_replicas)
    watch.Replay.after_step = counted(counts, "replayed", watch.Replay.after_step)  # type: ignore[method-assign]
    began = time.monotonic()
    run = run_training(config.model_copy(update={"resilience": rules}), RepeatingSource())
    return {"steps": run.state.step, **counts, "seconds": time.monotonic() - began}


def counted(counts: dict[str, int], name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    """An action that is counted when it has raised nothing."""

    def count(*args: Any) -> Any:
        result = action(*args)
        counts[name] += 1
        return result

    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alarms", type=int, metavar="STEPS", help="look for false alarms in a run of so many steps")
    parser.add_argument("--reduction", action="store_true", help="time training.reduction=canonical")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if args.alarms:
        with tempfile.TemporaryDirectory() as folder:
            found = run_distributed(alarms, RANKS, args.alarms, folder, timeout_s=36_000)[0]
        results["alarms"] = found
        done = f"{found['steps']} steps, {found['compared']} compared, {found['replayed']} replayed"
        print(f"{done}, no alarm; {found['seconds']:.0f} s")
    else:
        results |= costs(args.repeats, args.reduction)
    write_json(args.json, results)


def costs(repeats: int, of_reduction: bool) -> dict[str, Any]:
    """The tables of costs; the slower rank counts."""
    from hope_megatron.config.resilience import ReplicaConfig

    every, rows, results = ReplicaConfig().every, [], {}
    for size in SIZES:
        for count in (1, 4):
            ranks = run_distributed(reduction if of_reduction else checks, RANKS, size, count, repeats, timeout_s=3600)
            results[f"{size}-{count}"] = ranks
            s = {name: max(statistics.median(r[name]) for r in ranks) for name in ranks[0] if name != "parameters"}
            head = [f"{size}, {ranks[0]['parameters']:,}", count]
            if of_reduction:
                rows.append([*head, 1e3 * s["fast"], 1e3 * s["canonical"], s["canonical"] / s["fast"]])
                continue
            straggler = (s["gather"] / STRAGGLER_STEPS + s["clock"]) / s["step"]
            share = [100 * s[name] / every / s["step"] for name in ("compare", "replay")]
            rows.append(
                [
                    *head,
                    *(1e3 * s[n] for n in ("step", "compare", "replay", "gather")),
                    *share,
                    sum(share),
                    100 * straggler,
                ]
            )
    header = ["parameters", "micro-batches", "step ms"]
    print_table(
        [*header, "canonical ms", "ratio"]
        if of_reduction
        else [*header, "compare ms", "replay ms", "gather ms", "compare %", "replay %", "both %", "straggler %"],
        rows,
    )
    return results


if __name__ == "__main__":
    main()
