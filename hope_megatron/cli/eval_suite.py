"""The paper's tests: small models of each family, trained here at equal parameters and steps, beside the published claims.

Examples:

    hope eval suite languages                               formal languages: in and beyond the training length
    hope eval suite mad --families hope titans deltanet     some of the families
    hope eval suite needles RUN --lengths 1024 16384 65536  a trained run, streamed in constant memory
    hope eval suite needles RUN --data novels/              needles and bAbI's facts hidden in your text
    hope eval suite ablations                               HOPE without one part at a time
    hope eval suite classes --data banking77 data_full.json your copies of the published files
    hope eval suite domains --data laws/ novels/ code/      your text, one domain after the other
    hope eval suite classes --dry-run                       what would be trained
    hope eval suite recall --quick                          minutes instead of hours, to see that it works
    hope eval suite mad --json mad.json --png mad.png       interrupted? the same command goes on
    hope eval suite mad --merge a/mad.json b/mad.json       one table of what two machines ran

Finished trainings are kept in the JSON file; the same command again goes on with the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.models import MODEL_HELP, prepare_process
from hope_megatron.cli.output_files import check_writable
from hope_megatron.convert.open_model import open_model

SUITES = {
    "languages": "formal languages: parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n, shuffle-2",
    "recall": "copying and associative recall",
    "mad": "MAD: compression, in-context and fuzzy recall, selective copying, memorization",
    "needles": "needles in a haystack by length: models trained here, or RUN",
    "ablations": "HOPE without one of its parts at a time, on text and on recall",
    "classes": "classes that arrive in groups: in context, fine-tuned, EWC",
    "domains": "continual pretraining over domains of text, by number of CMS levels",
}


# Which suites have a use for an option; a RUN is trained, so that "needles RUN" takes none that is about training.
_TAKEN_BY = {
    **dict.fromkeys(
        ("families", "steps", "lr", "optimizer", "chunk_tokens", "width", "layers", "heads"), tuple(SUITES)
    ),
    "hope": ("languages", "recall", "mad", "needles", "classes"),
    "lengths": ("languages", "recall", "mad", "needles", "needles RUN", "domains"),
    "data": ("classes", "domains", "needles RUN"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    listed = "; ".join(f"{name}: {text}" for name, text in SUITES.items())
    parser.add_argument("name", choices=SUITES, metavar="NAME", help=listed)
    parser.add_argument(
        "model", nargs="?", metavar="RUN", help=f"needles: {MODEL_HELP}; default: train small ones here"
    )
    parser.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help="hope, transformer_pp, or of configs/families; or some of a suite's own rows",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="some of the suite's tasks (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each cell (default 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each training")
    parser.add_argument(
        "--lr", type=float, metavar="RATE", help="peak learning rate (default: AdamW 3e-3; M3, Muon 1e-2)"
    )
    parser.add_argument(
        "--optimizer", choices=["adamw", "m3", "muon"], help="default adamw; languages, mad, needles, classes m3"
    )
    parser.add_argument("--chunk-tokens", type=int, metavar="C", help="tokens per chunk of every memory")
    parser.add_argument("--width", type=int, metavar="D", help="model width")
    parser.add_argument("--layers", type=int, metavar="N", help="layers (default 2)")
    parser.add_argument("--heads", type=int, metavar="N", help="heads of every layer (default 2)")
    parser.add_argument(
        "--hope",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="languages, recall, mad, needles, classes: settings of HOPE, for example memory.eta_init=0.5",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="T",
        help="needles: lengths to ask at, the first is trained; languages, recall, mad: longest trained length; domains: context",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="classes: CLINC, Banking77, DBpedia files; domains: text; needles RUN: text to hide needles in",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and what is there already")
    parser.add_argument("--quick", action="store_true", help="smaller tasks and models, fewer steps")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads (default 1: the models are small)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="DIR/NAME.json, DIR/NAME.md and DIR/NAME.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished cells here, and go on from them")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other machines' JSON of the same settings (of other --families, say): their cells are not run again",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the tables")


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the tables."""
    _check(args)
    prepare_process(args.threads)
    from hope_megatron.runtime.files import write_text
    from hope_megatron.suites.registry import build_suite
    from hope_megatron.suites.report import plot_suite, suite_markdown, suite_outline
    from hope_megatron.suites.suite import SuiteOptions, run_suite
    from hope_megatron.training.provenance import provenance

    options = SuiteOptions(
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
    if args.model:
        from hope_megatron.suites.needle_text import build

        opened = open_model(args.model)
        suite = build(opened.model, opened.tokenizer.encode, opened.name, opened.title, opened.window_tokens, options)
    else:
        suite = build_suite(args.name, options)
    json_file, markdown_file, png_file = _outputs(args)
    if args.dry_run:
        print(suite_outline(suite, json_file, args.merge))
        return 0
    check_writable(json_file, markdown_file, png_file)
    results = run_suite(suite, json_file, provenance(), args.merge, tell=lambda line: print(line, flush=True))
    results.save()
    text = suite_markdown(results)
    print(f"\n{text}")
    if markdown_file:
        write_text(markdown_file, text)
    if png_file:
        plot_suite(results, png_file)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.model and args.name != "needles":
        raise ModelReferenceError(f"suite {args.name} trains its models; only needles takes a RUN ({args.model})")
    suite = f"{args.name} RUN" if args.model else args.name
    for option, suites in _TAKEN_BY.items():
        if getattr(args, option) and suite not in suites:
            raise ModelReferenceError(f"suite {suite} has no use for --{option.replace('_', '-')}; leave it out")
    for option in ("seeds", "steps", "chunk_tokens", "width", "layers", "heads", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ModelReferenceError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if args.lengths and min(args.lengths) < 16:
        raise ModelReferenceError(f"--lengths {min(args.lengths)}: give lengths of at least 16")
    if args.lr is not None and args.lr <= 0:
        raise ModelReferenceError(f"--lr {args.lr} must be positive")


def _outputs(args: argparse.Namespace) -> tuple[Path | None, Path | None, Path | None]:
    """JSON, Markdown, PNG: what was named, else what --out says."""
    given = (args.json, args.markdown, args.png)
    if args.out is None:
        return given
    defaults = (args.out / f"{args.name}.{suffix}" for suffix in ("json", "md", "png"))
    return tuple(path or default for path, default in zip(given, defaults))  # type: ignore[return-value]
