"""How fast does training run, end to end, and where does a step's time go?

    python benchmarks/train.py                                         hope_tiny beside transformer_pp_tiny
    python benchmarks/train.py --model hope_760m --batch 8 --json train.json        on a GPU: bf16, one device
    python benchmarks/train.py --model hope_760m --layers 4 optim.name=adamw        shortened; any key of a run file
    torchrun --nproc-per-node 8 benchmarks/train.py --model hope_760m --batch 64    a whole node

A real engine takes real steps (forward, backward, reduction, optimizer) on samples from a formula. Every figure is the median of
the timed steps; min and max stand beside it. Reported: tokens/s, the model FLOP rate (forward and backward of the mathematics,
nothing that is computed twice) and its share of a GPU's peak, peak memory, and the share of time by phase. Models take turns
inside one process only if each is small; name one model for a figure to quote.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections import defaultdict
from typing import Any

import torch

from hope_megatron.config import RunConfig, load_model_config, resolve_run_config
from hope_megatron.config.accounting import forward_flops, num_parameters, recompute_flops
from hope_megatron.config.hardware import find_hardware
from hope_megatron.runtime.process import silence_import_warnings
from hope_megatron.testing.benchmark import machine, print_table, spread, write_json
from hope_megatron.testing.tiny import RepeatingSource


def main() -> None:
    args = _arguments()
    results = {name: measure(_run_config(name, args), args) for name in args.model}
    if int(os.environ.get("RANK", 0)):
        return
    header = ["model", "parameters", "tokens/s", "min", "max", "TFLOP/s", "share of peak", "peak GiB"]
    print_table(header, [_row(name, result) for name, result in results.items()])
    phases = sorted({phase for result in results.values() for phase in result["share"]})
    print_table(
        ["share of time", *phases],
        [[name, *(f"{r['share'].get(p, 0):.0%}" for p in phases)] for name, r in results.items()],
    )
    write_json(args.json, {"machine": machine(_device()), "arguments": vars(args), "models": results})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the run's configuration")
    parser.add_argument("--model", nargs="+", default=["hope_tiny", "transformer_pp_tiny"], help="presets")
    parser.add_argument("--layers", type=int, help="so many layers instead of the preset's")
    parser.add_argument("--batch", type=int, help="sequences of the global batch (default: one per data-parallel rank)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a forward pass (default 1)")
    parser.add_argument("--seq-length", type=int, help="tokens of a sequence (default 1024 on a CPU, 4096 on a GPU)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--hardware", default="h100", help="GPU whose peak the rate is compared with (default h100)")
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_intermixed_args()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run_config(name: str, args: argparse.Namespace) -> RunConfig:
    model = load_model_config(name)
    layers = {} if args.layers is None else {"num_layers": args.layers}
    world_size, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), _device() == "cuda"
    values: dict[str, Any] = {
        "name": "benchmark",
        "model": {**model.model_dump(mode="json", exclude_unset=True), **layers},
        "training": {
            "steps": args.warmup + args.steps + 1,
            "seq_length": args.seq_length or (4096 if on_gpu else 1024),
            "global_batch_size": args.batch or args.micro_batch * world_size,
            "micro_batch_size": args.micro_batch,
            "precision": "bf16" if on_gpu else "fp32",
            "num_threads": args.threads,
        },
        "data": {"train": "train", "tokenizer": "tokenizer.model"},
        "optim": {"warmup_steps": 1},
        "tracking": {"mlflow": False},
    }
    return resolve_run_config(values, args.overrides, source="benchmarks/train.py")


def measure(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps; see the module's docstring for the figures."""
    silence_import_warnings()  # what Megatron-Core and DeepSpeed do without
    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    mesh = init_distributed(config.parallel, num_threads=args.threads)
    engine, state = build_engine(config, mesh), TrainingState()
    phases = _PhaseTimes(engine)
    seconds, shares = [], []
    with BatchReader(RepeatingSource(seq_length=config.training.seq_length), config, mesh) as reader:
        for number in range(args.warmup + args.steps):
            stalled, started = reader.stall_s, phases.begin()
            train_step(engine, reader, state, config)
            took = phases.now() - started
            if number >= args.warmup:
                seconds.append(took)
                shares.append({**phases.seconds, "data": reader.stall_s - stalled})
    result = _figures(config, args, seconds, mesh.world_size)
    by_phase = {name: statistics.median(share.get(name, 0.0) for share in shares) for name in shares[0]}
    total = statistics.median(seconds)
    result["share"] = {name: value / total for name, value in by_phase.items()}
    result["share"]["other"] = max(0.0, 1.0 - sum(result["share"].values()))
    shutdown_distributed()
    return result


def _figures(config: RunConfig, args: argparse.Namespace, seconds: list[float], world_size: int) -> dict[str, Any]:
    model, training = config.model, config.training
    flops = 3 * forward_flops(model, training.seq_length).total
    again = recompute_flops(model, training.seq_length, training.recompute)
    rate = training.tokens_per_step / statistics.median(seconds)
    peak = find_hardware(args.hardware).peak_flops if _device() == "cuda" else None
    return {
        "parameters": num_parameters(model),
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / world_size,
        "step_seconds": spread(seconds),
        "model_flops_per_second_per_device": rate * flops / world_size,
        "hardware_flops_per_second_per_device": rate * (flops + again) / world_size,
        "model_flops_utilization": None if peak is None else rate * flops / world_size / peak,
        "peak_memory_bytes": _peak_memory(),
        "tokens_per_step": training.tokens_per_step,
        "config": config.model_dump(mode="json"),
    }


def _peak_memory() -> int:
    """On a GPU of tensors since the process began, on a CPU of the whole process."""
    if _device() == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _PhaseTimes:
    """Seconds of the last step by phase. The engine's methods are timed from outside; a GPU is waited for at each border."""

    def __init__(self, engine: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        wrapped = engine._deepspeed
        self._time(wrapped, "forward", "forward")
        self._time(wrapped, "backward", "backward")
        self._time(wrapped, "step", "optimizer")

    def begin(self) -> float:
        """Forget the step before."""
        self.seconds.clear()
        return self.now()

    def now(self) -> float:
        """Seconds on a clock, once the device is idle."""
        if _device() == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _time(self, owner: Any, method: str, phase: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[phase] += self.now() - started

        setattr(owner, method, timed)


def _row(name: str, result: dict[str, Any]) -> list[Any]:
    per_step, share = result["step_seconds"], result["model_flops_utilization"]
    return [
        name,
        f"{result['parameters']:,}",
        result["tokens_per_second"],
        result["tokens_per_step"] / per_step["max"],
        result["tokens_per_step"] / per_step["min"],
        result["model_flops_per_second_per_device"] / 1e12,
        "-" if share is None else f"{share:.1%}",
        result["peak_memory_bytes"] / 2**30,
    ]


if __name__ == "__main__":
    main()
