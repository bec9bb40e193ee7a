"""See, reshard, average and reduce checkpoints. Each result is read back and compared before it appears.

RUN is a run directory (its newest checkpoint), RUN@STEP or a checkpoint directory; with :ema its averaged weights.

Examples:

    hope checkpoint inspect runs/NAME                             progress, layout, history, parameters, digests
    hope checkpoint reshard runs/NAME@500 OUT --tp 2 --zero-stage 1    the files that training in that layout writes
    hope checkpoint average RUN@800 RUN@900 RUN@1000 OUT          mean of the weights; --weights 1,1,2 for another one
    hope checkpoint weights runs/NAME OUT                         the weights alone, without optimizer states
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.layout_options import add_layout_arguments, asked_layout, changed_layout
from hope_megatron.cli.models import add_actions, prepare_process
from hope_megatron.config.changes import describe_entry

if TYPE_CHECKING:
    from hope_megatron.checkpoint.reshard import Rewritten
    from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint


_RUN = "a run directory (its newest checkpoint), RUN@STEP or a checkpoint; with :ema its averaged weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their arguments."""
    inspect, reshard, average, weights = add_actions(
        parser,
        {
            "inspect": "what a checkpoint holds; verifies every digest",
            "reshard": "the same checkpoint for another number or arrangement of ranks",
            "average": "the mean of the weights of several checkpoints of one model",
            "weights": "the weights alone, a quarter or less of the size",
        },
    )
    for action, do in ((inspect, _inspect), (reshard, _reshard), (weights, _weights)):
        action.add_argument("run", metavar="RUN", help=_RUN)
        action.set_defaults(do=do)
    average.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    average.set_defaults(do=_average)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    average.add_argument("--weights", metavar="W,W,...", help="one number per checkpoint (default: all alike)")
    for action in (reshard, average, weights):
        action.add_argument("out", type=Path, metavar="OUT", help="directory of the new checkpoint, made new")
        add_layout_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    prepare_process()
    args.do(args)
    return 0


def write_in_layout(unsharded: UnshardedCheckpoint, args: argparse.Namespace, out: Path) -> None:
    """Write a checkpoint in the layout that was asked for, and say what was compared."""
    from hope_megatron.checkpoint.reshard import write_checkpoint

    _print_written(write_checkpoint(unsharded, changed_layout(args, unsharded.layout), out), unsharded.origin)


def _reshard(args: argparse.Namespace) -> None:
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.reshard import reshard
    from hope_megatron.config import ParallelLayout

    if not asked_layout(args):
        raise ModelReferenceError("give the new layout: --tp, --dp, --zero-stage or --sequence-parallel")
    source = find_checkpoint(args.run)
    layout = changed_layout(args, ParallelLayout.of(source.checkpoint.description["layout"]))
    _print_written(reshard(source, layout, args.out), str(source.path))


def _print_written(written: Rewritten, origin: str) -> None:
    print(f"{written.directory}: {written.num_files} files for {written.layout.in_words()}")
    print(f"checked: {written.num_elements:,} numbers read back, all equal to those of {origin}")


def _weights(args: argparse.Namespace) -> None:
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.unsharded import read_unsharded

    unsharded = read_unsharded(find_checkpoint(args.run)).weights_only().with_history("extraction of the weights")
    write_in_layout(unsharded, args, args.out)


def _average(args: argparse.Namespace) -> None:
    from hope_megatron.checkpoint.average import average
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.unsharded import read_unsharded

    if len(args.runs) < 2:
        raise ModelReferenceError("hope checkpoint average takes at least two checkpoints, then the new directory")
    weights = _parse_weights(args.weights, len(args.runs))
    write_in_layout(average([read_unsharded(find_checkpoint(name)) for name in args.runs], weights), args, args.out)


def _parse_weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelReferenceError(f"--weights {text!r} are no numbers; give for example --weights 1,1,2") from None
    if len(weights) != count:
        raise ModelReferenceError(f"--weights {text} are {len(weights)} numbers for {count} checkpoints")
    return weights


def _inspect(args: argparse.Namespace) -> None:
    from hope_megatron.checkpoint.facts import read_facts
    from hope_megatron.checkpoint.find import find_checkpoint

    source = find_checkpoint(args.run)
    source.checkpoint.verify()
    facts = read_facts(source)
    print(json.dumps(facts, indent=1) if args.json else _in_words(facts))


def _in_words(facts: dict[str, Any]) -> str:
    size, progress = f"{facts['bytes'] / 2**20:,.1f} MiB", facts["progress"]
    lines = [f"{facts['path']}: complete, {facts['files']} files, {size}, all digests right"]
    lines += [f"foreign: {name} is not in the manifest, and is never read" for name in facts["foreign_files"]]
    lines.append(
        f"run {facts['run']}, step {progress['step']:,} of {facts['steps']:,}, {progress['tokens']:,} tokens seen"
    )
    lines.append("written by " + ", ".join(f"{name} {value}" for name, value in facts["layout"].items()))
    lines.append(f"commit {facts['commit'] or 'unknown'}")
    lines += [describe_entry(entry) for entry in facts["history"]]
    for name, parameter in facts["parameters"].items():
        lines.append(f"  {name:<48} {'x'.join(map(str, parameter['shape'])):>20}  {' '.join(parameter['states'])}")
    return "\n".join(lines)
