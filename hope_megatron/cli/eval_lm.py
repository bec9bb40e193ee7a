"""Tasks of lm-evaluation-harness on a model, on several processes if wanted.

Examples:

    hope eval lm runs/NAME --tasks paper                  WikiText and the eight tasks of the paper's average
    hope eval lm runs/NAME --tasks piqa boolq --nproc 2   each process answers a part of the questions
    hope eval lm runs/NAME --tasks paper --data DATA      their data from files, DATA/piqa/validation.jsonl and so on
    hope eval lm DIR --tasks mine --include TASKS         tasks of one's own: YAML files in the directory TASKS

Needs the package lm-eval (pip install -e '.[eval]' in the source directory).
Task data come from local files or the Hugging Face cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.eval_output import add_output_arguments, check_output, write_output
from hope_megatron.cli.models import add_model_argument, prepare_process
from hope_megatron.convert.open_model import OpenModel, open_model
from hope_megatron.runtime.launchers import adopt_launcher
from hope_megatron.runtime.world import World, WorldError, launched_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_argument(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="names of tasks; paper: WikiText and the eight of the paper's average",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="files of the paper's tasks, such as DIR/piqa/validation.jsonl"
    )
    parser.add_argument("--include", type=Path, metavar="DIR", help="a directory with YAML files of further tasks")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default 8)")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes side by side (default 1)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Start the processes, or be one of them."""
    if args.batch_size < 1 or args.nproc < 1 or (args.limit is not None and args.limit < 1):
        raise ModelReferenceError("--batch-size, --nproc and --limit must be positive")
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelReferenceError(
            "lm-evaluation-harness is not installed; run pip install -e '.[eval]' in the source directory"
        )
    if args.include is not None and not args.include.is_dir():
        raise ModelReferenceError(f"--include {args.include} is no directory; name the one that holds the YAML files")
    if args.data is not None and not args.data.is_dir():
        raise ModelReferenceError(f"--data {args.data} is no directory; name the one with a folder for each task")
    adopt_launcher()
    world = launched_world()
    if world is not None and args.nproc != 1:
        raise WorldError(
            f"--nproc {args.nproc} starts processes, but {world} say that a launcher has started this one; give one of them"
        )
    if world is not None or args.nproc == 1:
        return _evaluate(args, num_threads=None) if world is None else _work(args, world)
    from launch.local import run_local

    return run_local(["eval", "lm", *_argv(args)], args.nproc)


def _argv(args: argparse.Namespace) -> list[str]:
    """The arguments again, for a worker."""
    argv = [args.model, "--tasks", *args.tasks]
    for name in ("include", "data", "num_fewshot", "limit", "batch_size", "tokenizer", "json", "markdown", "png"):
        value = getattr(args, name)
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    return [*argv, *(["--mlflow"] if args.mlflow else [])]


def _work(args: argparse.Namespace, world: World) -> int:
    """Be one process of a world that a launcher has started."""
    from hope_megatron.runtime.rank import reported_failures

    with reported_failures(world):
        _evaluate(args, num_threads=1)
    return 0


def _evaluate(args: argparse.Namespace, num_threads: int | None) -> int:
    prepare_process(num_threads)
    if not sys.stderr.isatty():  # the harness's progress bars are for people; read by its libraries when imported
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from hope_megatron.eval.harness import HarnessModel, evaluate_tasks
    from hope_megatron.eval.paper import PAPER_TASKS
    from hope_megatron.parallel.distributed import shutdown_distributed

    opened = open_model(args.model, args.tokenizer)
    check_output(args, opened)
    model = HarnessModel(opened.model, opened.tokenizer, window_tokens=opened.window_tokens, batch_size=args.batch_size)
    tasks = list(dict.fromkeys(name for task in args.tasks for name in (PAPER_TASKS if task == "paper" else [task])))
    result = evaluate_tasks(
        model,
        tasks,
        task_directory=None if args.include is None else str(args.include),
        data_dir=args.data,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        say=print if model.rank == 0 else lambda _: None,
    )
    if result is not None:
        _report(args, opened, result)
    if model.world_size > 1:
        shutdown_distributed()
    return 0


def _report(args: argparse.Namespace, opened: OpenModel, result: dict[str, Any]) -> None:
    from hope_megatron.eval.paper import AVERAGED, average_accuracy, paper_table
    from hope_megatron.eval.report import markdown_table, plot_tasks

    tasks = result["tasks"]
    flat = [(task, metric, entry) for task, figures in tasks.items() for metric, entry in figures.items()]
    num_parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    value = lambda task, metric: tasks.get(task, {}).get(metric, {}).get("value")  # noqa: E731
    accuracies = {task: value(task, metric) for task, metric in AVERAGED.items()}
    average = average_accuracy({task: share for task, share in accuracies.items() if share is not None})
    tables = markdown_table(
        ["task", "metric", "value", "standard error"], [[t, m, e["value"], e["stderr"]] for t, m, e in flat]
    )
    wiki, lambada = value("wikitext", "word_perplexity"), value("lambada_openai", "perplexity")
    if any(figure is not None for figure in (wiki, lambada, *accuracies.values())):
        tables += "\n\n" + paper_table(num_parameters, wiki, lambada, accuracies)
    print(f"{opened.name}\n\n{tables}")
    if args.png:
        plot_tasks(args.png, flat, f"{opened.title}: lm-evaluation-harness")
    result = {"model": opened.name, "parameters": num_parameters, **result, "average_accuracy": average}
    result |= {"limit": args.limit, "num_fewshot": args.num_fewshot}
    write_output(args, opened, result, tables, {f"lm/{t}/{m}": e["value"] for t, m, e in flat})
