"""What a run needs, before it is run: parameters, FLOPs, bytes per GPU, time.

examples:
  hope plan hope_760m                                  a model preset, with 20 tokens per parameter
  hope plan titans_760m                                a baseline family at that size
  hope plan hope_760m_30b --world 16 --hardware h200   a run file
  hope plan hope_1b3_100b parallel.zero_stage=2 training.micro_batch_size=2 --world 128
  hope plan hope_760m_30b --world 8 --tune --out best.yaml      the five fastest settings that fit; the first one's overrides
  hope plan hope_760m --world 64 --seq 1048576 --tune           the same for sequences of a million tokens
  hope plan --calibrate runs/mine --world 8 --out mycluster.json                efficiencies that a run reached
  hope plan hope_760m_30b --world 8 --efficiency mycluster.json
  hope plan hope_7b training.global_batch_size=4096 --world 4096 --failures 1/264d-per-node --nodes 512   goodput, and when to save
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hope_megatron.cli.output_files import check_writable
from hope_megatron.cli.plan_time import (
    calibrate_by,
    choices_data,
    print_choices,
    print_time,
    tune,
    write_overrides,
)
from hope_megatron.cli.tables import new_table
from hope_megatron.config import RunConfig
from hope_megatron.config.base import ConfigError
from hope_megatron.config.calibration import read_efficiency
from hope_megatron.config.efficiency import DEFAULT, Efficiency
from hope_megatron.config.goodput import Faults
from hope_megatron.config.hardware import HARDWARE, find_hardware
from hope_megatron.config.planned_run import has_data, load_for_plan
from hope_megatron.config.run_plan import make_plan, plan_goodput
from hope_megatron.config.tuning import sequences_per_step
from hope_megatron.runtime.formatting import bytes_text, count_text, duration_text, percent_text

_COSTS = {
    "detect_s": "until a fault is seen",
    "restart_s": "from there to the next step",
    "stall_s": "what training waits for in a save",
    "write_s": "until a save is whole on disk",
}


def add_planned(parser: argparse.ArgumentParser, example: str, **config: Any) -> None:
    """What is planned, or rehearsed, and for how many GPUs of which kind. example: of an override."""
    parser.add_argument("config", metavar="CONFIG", help="run file, model file, or the name of one", **config)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=f"changes, for example {example}")
    parser.add_argument("--world", type=int, metavar="N", help="number of GPUs (default: tensor x context parallel)")
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME", help=f"one of {', '.join(HARDWARE)} (default: %(default)s)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope plan`."""
    add_planned(parser, "training.seq_length=8192", nargs="?")
    parser.add_argument(
        "--utilization",
        type=float,
        metavar="X",
        help="share of the peak FLOP/s that is reached (default: the hardware's row)",
    )
    parser.add_argument(
        "--seq", type=int, metavar="N", help="sequences of N tokens, and as many tokens a step as before"
    )
    parser.add_argument("--tune", action="store_true", help="search micro-batch, recomputation, ZeRO, TP, SP and CP")
    parser.add_argument(
        "--calibrate", type=Path, metavar="RUN", help="take efficiencies from a run's metrics; needs --out"
    )
    parser.add_argument(
        "--efficiency", type=Path, metavar="FILE", help="calibrated efficiencies instead of the assumed ones"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where --tune or --calibrate writes")
    failures = parser.add_argument_group("failures")
    failures.add_argument(
        "--failures",
        metavar="N/TIME-per-node",
        help="how often nodes fail, for example 1/264d-per-node (h, d, w; per node or job): prints the expected goodput",
    )
    failures.add_argument("--nodes", type=int, metavar="N", help="nodes of the job (default: one per 8 GPUs)")
    for name, default in asdict(Faults()).items():
        option = name.removesuffix("_s").replace("_", "-")
        failures.add_argument(
            f"--{option}-s", type=float, default=default, metavar="S", help=f"{_COSTS[name]} (default: %(default)g s)"
        )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.world is not None and args.world < 1:
        raise ConfigError(f"--world {args.world}: give at least 1")
    if args.utilization is not None and not 0 < args.utilization <= 1:
        raise ConfigError(f"--utilization {args.utilization}: give a share of the peak between 0 and 1")
    if args.out is not None:
        check_writable(args.out)
        if not (args.tune or args.calibrate):
            raise ConfigError("--out FILE is written by --tune or --calibrate; give one of them")
    if args.calibrate is not None:
        return _calibrate(args)
    if args.config is None:
        raise ConfigError("give a run file, a model file, or the name of one")
    config = load_for_plan(args.config, args.overrides)
    world_size = args.world or config.parallel.ranks_per_sequence
    own, longer = config, []
    if args.seq is not None:
        batch = sequences_per_step(config, world_size, args.seq)
        longer = [f"training.seq_length={args.seq}", f"training.global_batch_size={batch}"]
        config = load_for_plan(args.config, [*args.overrides, *longer])
    efficiency = DEFAULT if args.efficiency is None else read_efficiency(args.efficiency)
    if args.tune:
        return _tune(args, config, world_size, efficiency, own, longer)
    plan = {"data": _data(config)} | make_plan(config, world_size, args.hardware, args.utilization, efficiency)
    if args.failures is not None:
        faults = Faults(**{name: getattr(args, name) for name in asdict(Faults())})
        plan["goodput"] = plan_goodput(plan, args.failures, args.nodes or max(1, world_size // 8), faults)
    elif args.nodes is not None:
        raise ConfigError(f"--nodes {args.nodes} says how many nodes fail; give --failures too")
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        _print(plan)
    return 0


def _tune(
    args: argparse.Namespace,
    config: RunConfig,
    world_size: int,
    efficiency: Efficiency,
    own: RunConfig,
    longer: list[str],
) -> int:
    """own, longer: the run at its own length, and what --seq changes of it."""
    hardware = find_hardware(args.hardware)
    choices = choices_data(tune(config, world_size, hardware, efficiency), world_size, longer)
    short = choices_data(tune(own, world_size, hardware, efficiency)[:1], world_size) if longer else []
    if args.json:
        lengths = [config.training.seq_length] * len(choices) + [own.training.seq_length] * len(short)
        found = [{"seq_length": length, **choice} for length, choice in zip(lengths, [*choices, *short], strict=True)]
        print(json.dumps(found, indent=2))
    else:
        print_choices(choices, short[0] if short else None, own.training.seq_length)
    if args.out is not None:
        title = f"hope plan {args.config} --tune --world {world_size} --hardware {args.hardware}"
        write_overrides(args.out, choices[0]["overrides"], title + (f" --seq {args.seq}" if args.seq else ""))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    if args.out is None or args.world is None or args.config is not None:
        raise ConfigError(
            "--calibrate RUN wants --world N, the GPUs that the run had, --out FILE, and no configuration"
        )
    print(calibrate_by(args.calibrate, args.world, find_hardware(args.hardware), args.out))
    return 0


def _data(config: RunConfig) -> dict[str, Any]:
    """`passes` over the data sets and a `warning` where they are many; or `unknown`, why they cannot be counted."""
    from hope_megatron.training.epochs import repetition_warning
    from hope_megatron.training.sources import count_passes

    if not has_data(config):
        return {"unknown": "a model alone has no data; plan a run file for epochs"}
    passes, why_not = count_passes(config)
    if why_not:
        return {"unknown": why_not}
    return {"passes": [one.to_dict() for one in passes], "warning": repetition_warning(passes)}


def _data_text(data: dict[str, Any]) -> str:
    if "unknown" in data:
        return f"epochs unknown: {data['unknown']}"
    return ", ".join(
        f"{one['epochs']:,.3g} epochs of {one['name']} ({count_text(one['unique_tokens'])} tokens)"
        for one in data["passes"]
    )


def _estimate_text(plan: dict[str, Any]) -> str:
    """Time at an assumed share of the peak, where nothing better is known."""
    if "unknown" not in plan["time"]:
        return ""
    estimated = plan["estimate"]
    return (
        f"at {percent_text(estimated['utilization'])} of {count_text(estimated['hardware']['peak_flops'])}FLOP/s (assumed; MFU "
        f"{percent_text(estimated['mfu'])}): {count_text(estimated['tokens_per_second'])} tokens/s, "
        f"[bold]{duration_text(3600 * estimated['hours'])}[/bold]\n"
    )


def _print(plan: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    mesh, run, estimated = plan["mesh"], plan["run"], plan["estimate"]
    hardware = estimated["hardware"]
    context = f" x context parallel {mesh['context_parallel']}" if mesh["context_parallel"] > 1 else ""

    console.print(f"[bold]{plan['name']}[/bold] · model {plan['model']}\n")

    counts = dict(plan["parameters"])
    total, non_embedding = counts.pop("total"), counts.pop("non_embedding")
    parameters = new_table("Parameters", "", "count", "share")
    for part, count in counts.items():
        parameters.add_row(part, count_text(count), percent_text(count / total))
    parameters.add_row("[bold]total[/bold]", f"[bold]{count_text(total)}[/bold]", f"{total:,}", end_section=True)
    parameters.add_row("without embeddings", count_text(non_embedding), percent_text(non_embedding / total))

    flops = new_table("FLOPs per token", "", "forward", "backward", "share")
    spent = plan["flops_per_token"]
    for name, value in spent["forward"].items():
        if name != "total" and value:
            flops.add_row(
                name.replace("_", " "),
                count_text(value),
                count_text(2 * value),
                percent_text(3 * value / spent["total"]),
            )
    flops.add_row("recompute", "", count_text(spent["recompute"]), percent_text(spent["recompute"] / spent["total"]))
    flops.add_row("[bold]total[/bold]", "", f"[bold]{count_text(spent['total'])}[/bold]", "")

    memory = new_table("Bytes per GPU", "", "", "of the device")
    for name, value in plan["bytes_per_gpu"].items():
        if name not in ("total", "capacity", "host"):
            memory.add_row(name.replace("_", " "), bytes_text(value), percent_text(value / hardware["memory_bytes"]))
    used = plan["bytes_per_gpu"]["total"]
    memory.add_row(
        "[bold]total[/bold]", f"[bold]{bytes_text(used)}[/bold]", percent_text(used / hardware["memory_bytes"])
    )
    if plan["bytes_per_gpu"]["host"]:
        memory.add_row("in host memory", bytes_text(plan["bytes_per_gpu"]["host"]), "")

    for part in (parameters, flops, memory):
        console.print(part, "")
    console.print(
        f"[bold]Run[/bold]\n"
        f"{run['steps']:,} steps x {run['global_batch_size']} sequences x {run['seq_length']} tokens = "
        f"{count_text(run['tokens'])} tokens, {run['tokens_per_parameter']:.1f} per parameter\n"
        f"{run['optimizer']}, {run['precision']}, recompute {run['recompute']}, "
        f"micro-batch {run['micro_batch_size']} x {mesh['accumulation_steps']} accumulation steps\n"
        f"{mesh['world_size']} x {hardware['name']} = tensor parallel {mesh['tensor_parallel']}"
        f"{' with sequence parallelism' if mesh['sequence_parallel'] else ''}"
        f"{context} x data parallel {mesh['data_parallel']}, "
        f"ZeRO {mesh['zero_stage']}\n"
        f"{_levels_text(plan['levels'])}"
        f"{_estimate_text(plan)}"
        f"data: {_data_text(plan['data'])}",
        soft_wrap=True,
    )
    print_time(console, plan["time"], mesh["world_size"])
    if "goodput" in plan:
        _print_goodput(console, plan["goodput"])
    if plan["data"].get("warning"):
        console.print(f"[bold red]Repeated data:[/bold red] {plan['data']['warning']}.", soft_wrap=True)
    if used > 0.9 * hardware["memory_bytes"]:
        console.print(
            f"[bold red]Does not fit[/bold red] with a tenth to spare in {bytes_text(hardware['memory_bytes'])}: set "
            "training.recompute=layer, lower training.micro_batch_size, or raise parallel.tensor_parallel."
        )


def _levels_text(levels: list[dict[str, Any]]) -> str:
    """A line for every level that is not simply updated at every step."""
    found = ""
    for number, level in enumerate(levels, 1):
        if level["text"] != "1":
            late = f"; step {level['after_the_run'][0]} is not before the run's end" if level["after_the_run"] else ""
            count = "as many updates as it decides" if level["adaptive"] else f"{level['updates']:,} updates"
            found += f"CMS level {number} of {len(levels)}: period in steps {level['text']}; {count}{late}\n"
    return found


def _print_goodput(console: Any, goodput: dict[str, Any]) -> None:
    shares = {"saves": "saves", "redone": "redone work", "detection": "detection", "restarts": "restarts"}
    lost = ", ".join(f"{text} {100 * goodput[name]:.2f} %" for name, text in shares.items())
    console.print(
        f"\n[bold]Goodput {100 * goodput['productive']:.2f} %[/bold] of the time trains, on {goodput['num_nodes']:,} nodes "
        f"with a failure every {duration_text(goodput['mtbf_s'])}: {lost}\n"
        f"save every {duration_text(goodput['interval_s'])}: checkpoint.every={goodput['checkpoint_every']:,}",
        soft_wrap=True,
    )
