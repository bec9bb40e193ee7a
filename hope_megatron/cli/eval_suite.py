"""The paper's tests: small models of each family, trained here at equal parameters and steps, beside the published claims.

Examples:

    hope eval suite languages                               formal languages: in and beyond the training length
    hope eval suite mad --families hope titans deltanet     some of the families
    hope eval suite needles RUN --lengths 1024 16384 65536  a trained run, streamed in constant memory
    hope eval suite needles RUN --data novels/              needles and bAbI's facts hidden in your text
    hope eval suite families                                every family of the paper's tables on text, recall and languages
    hope eval suite ablations                               HOPE without one part at a time
    hope eval suite classes --data banking77 data_full.json your copies of the published files
    hope eval suite domains --data laws/ novels/ code/      your text, one domain after the other
    hope eval suite classes --dry-run                       what would be trained
    hope eval suite recall --quick                          minutes instead of hours, to see that it works
    hope eval suite mad --json mad.json --png mad.png       interrupted? the same command goes on
    hope eval suite mad --merge a/mad.json b/mad.json       one table of what two machines ran
    hope eval suite check docs/records/data/languages.json  does a record repeat? some of its trainings again

Settings are chosen on validation data at the trained lengths, with as many tries for every family. The test is read once
after each training. Finished trainings are kept in the JSON file; the same command again goes on with the rest.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.models import MODEL_HELP, prepare_process
from hope_megatron.cli.output_files import check_writable
from hope_megatron.convert.open_model import open_model
from hope_megatron.suites.registry import SUITES

if TYPE_CHECKING:
    from hope_megatron.suites.suite import Suite, SuiteOptions

CHECK = "check"
_TRAINING_OPTIONS = ("families", "steps", "lr", "optimizer", "chunk_tokens", "width", "layers", "heads")
_OF_SOME = ("hope", "lengths", "data")


def _takes(suite: str, option: str) -> bool:
    """Whether a suite has a use for an option; a RUN is trained, so that "needles RUN" takes none that is about training."""
    if suite == "needles RUN":
        return option in ("lengths", "data")
    return suite != CHECK and (option in _TRAINING_OPTIONS or option in SUITES[suite].takes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    listed = f"one of {', '.join(SUITES)}; `hope list suites` says what they test. {CHECK}: some of a record's trainings again"
    parser.add_argument("name", metavar="NAME", help=listed)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="RUN|RECORD",
        help=f"needles: {MODEL_HELP}; default: train small ones here. check: a suite's JSON file",
    )
    several, number = partial(parser.add_argument, nargs="+"), partial(parser.add_argument, type=int, metavar="N")
    several(
        "--families",
        metavar="NAME",
        help="hope, transformer_pp, or of configs/families; or some of a suite's own rows",
    )
    several("--tasks", metavar="NAME", help="some of the suite's tasks (default: all)")
    number("--seeds", default=5, help="trainings of each cell that are tested, a seed each (default 5)")
    number("--steps", help="optimizer steps of each training")
    parser.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="train with this peak learning rate alone (default: several, chosen on validation data)",
    )
    parser.add_argument(
        "--optimizer",
        choices=["adamw", "m3", "muon"],
        help="train with this optimizer alone (default: chosen on validation data)",
    )
    parser.add_argument("--chunk-tokens", type=int, metavar="C", help="tokens per chunk of every memory")
    parser.add_argument("--width", type=int, metavar="D", help="model width")
    number("--layers", help="layers (default 2)")
    number("--heads", help="heads of every layer (default 2)")
    several(
        "--hope",
        default=[],
        metavar="KEY=VALUE",
        help="languages, permutations, recall, mad, needles, classes: settings of HOPE, for example memory.eta_init=0.5",
    )
    several(
        "--lengths",
        type=int,
        metavar="T",
        help="needles: lengths to ask at, the first is trained; languages, permutations, recall, mad: longest trained "
        "length; domains: context",
    )
    several(
        "--data",
        type=Path,
        default=[],
        metavar="PATH",
        help="classes: CLINC, Banking77, DBpedia files; domains: text; needles RUN: text to hide needles in",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and what is there already")
    parser.add_argument("--quick", action="store_true", help="smaller tasks and models, fewer steps")
    number("--threads", default=1, help="CPU threads (default 1: the models are small)")
    number("--cells", default=3, help="check: trainings to run again (default 3)")
    parser.add_argument("--sample", type=int, default=0, metavar="SEED", help="check: which trainings (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="DIR/NAME.json, DIR/NAME.md, DIR/NAME.png and DIR/NAME-steps.png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished cells here, and go on from them")
    several(
        "--merge",
        type=Path,
        default=[],
        metavar="FILE",
        help="other machines' JSON of the same settings (of other --families, say): their cells are not run again",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the tables")
    parser.add_argument(
        "--steps-png",
        type=Path,
        metavar="FILE",
        help="draw the score at the next longer lengths over the steps of training",
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the tables; or check a record."""
    _check(args)
    prepare_process(args.threads)
    if args.name == CHECK:
        return _check_record(args)
    from hope_megatron.runtime.files import write_text
    from hope_megatron.suites.plots import plot_suite, plot_trajectories
    from hope_megatron.suites.report import suite_markdown, suite_outline
    from hope_megatron.suites.running import run_suite
    from hope_megatron.training.provenance import provenance

    options = _options(args)
    suite = _suite(args, options)
    json_file, markdown_file, png_file, steps_file = _outputs(args)
    if args.dry_run:
        print(suite_outline(suite, json_file, args.merge))
        return 0
    check_writable(json_file, markdown_file, png_file, steps_file)
    results = run_suite(
        suite, json_file, provenance(), args.merge, tell=lambda line: print(line, flush=True), options=asdict(options)
    )
    results.save()
    text = suite_markdown(results)
    print(f"\n{text}")
    if markdown_file:
        write_text(markdown_file, text)
    if png_file:
        plot_suite(results, png_file)
    if steps_file:
        plot_trajectories(results, steps_file)
    return 0


def _options(args: argparse.Namespace) -> SuiteOptions:
    from hope_megatron.suites.suite import SuiteOptions

    return SuiteOptions(
        families=tuple(args.families) if args.families else None,
        tasks=tuple(args.tasks) if args.tasks else None,
        seeds=args.seeds,
        steps=args.steps,
        lr=args.lr,
        optimizer=args.optimizer,
        chunk_tokens=args.chunk_tokens,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        hope=tuple(args.hope),
        lengths=tuple(args.lengths) if args.lengths else None,
        data=tuple(args.data),
        quick=args.quick,
    )


def _suite(args: argparse.Namespace, options: SuiteOptions) -> Suite:
    from hope_megatron.suites.registry import build_suite

    if not args.model:
        return build_suite(args.name, options)
    from hope_megatron.suites.needle_text import build

    opened = open_model(args.model)
    return build(opened.model, opened.tokenizer.encode, opened.name, opened.title, opened.window_tokens, options)


def _check_record(args: argparse.Namespace) -> int:
    """0 if no figure fell outside its spread."""
    from hope_megatron.eval.report import markdown_table
    from hope_megatron.runtime.files import write_json
    from hope_megatron.suites.check import check_record

    check_writable(args.json)
    found = check_record(Path(args.model), args.cells, args.sample, tell=lambda line: print(line, flush=True))
    header = ["cell", "weights", "bin", "recorded", "found", "seeds from", "to", "verdict"]
    rows = [[str(c.cell), c.weights, c.name, c.recorded, c.found, c.low, c.high, c.verdict] for c in found]
    print("\n" + markdown_table(header, rows))
    outside = sum(c.verdict == "outside the spread" for c in found)
    same = sum(c.verdict == "same bits" for c in found)
    print(f"\n{len(found)} figures: {same} with the same bits, {outside} outside the spread over seeds")
    if args.json:
        write_json(args.json, {"record": args.model, "figures": [dict(zip(header, row)) for row in rows]})
    return 1 if outside else 0


def _check(args: argparse.Namespace) -> None:
    """
    Raises:
        UnknownNameError: there is no such suite.
        ModelReferenceError: the options do not fit it.
    """
    if args.name != CHECK:
        SUITES[args.name]
    if args.name == CHECK and not args.model:
        raise ModelReferenceError("check: name a record, the JSON file of a suite (hope eval suite check RECORD.json)")
    if args.model and args.name not in ("needles", CHECK):
        raise ModelReferenceError(f"suite {args.name} trains its models; only needles takes a RUN ({args.model})")
    suite = f"{args.name} RUN" if args.model and args.name != CHECK else args.name
    for option in (*_TRAINING_OPTIONS, *_OF_SOME):
        if getattr(args, option) and not _takes(suite, option):
            raise ModelReferenceError(f"suite {suite} has no use for --{option.replace('_', '-')}; leave it out")
    for option in ("seeds", "steps", "chunk_tokens", "width", "layers", "heads", "threads", "cells"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ModelReferenceError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if args.lengths and min(args.lengths) < 16:
        raise ModelReferenceError(f"--lengths {min(args.lengths)}: give lengths of at least 16")
    if args.lr is not None and args.lr <= 0:
        raise ModelReferenceError(f"--lr {args.lr} must be positive")


def _outputs(args: argparse.Namespace) -> tuple[Path | None, ...]:
    """JSON, Markdown, PNG of tables, PNG over steps: what was named, else what --out says."""
    given = (args.json, args.markdown, args.png, args.steps_png)
    if args.out is None:
        return given
    defaults = (args.out / f"{args.name}{ending}" for ending in (".json", ".md", ".png", "-steps.png"))
    return tuple(path or default for path, default in zip(given, defaults))
