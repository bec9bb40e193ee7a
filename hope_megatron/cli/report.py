"""A run as one HTML page with nothing beside it: curves, speed, health of the memories, events, settings, samples.

Examples:

    hope report runs/my_run                              writes runs/my_run/report.html
    hope report runs/my_run --out my_run.html
    hope report runs/my_run --samples 3 --prompt "The "  continues the prompt with the newest checkpoint; needs a while
    hope report runs/my_run --json                       the facts at the head of the page, for programs; writes nothing

A run that still trains can be reported; the page shows how far it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hope_megatron.checkpoint.errors import ModelReferenceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="continuations to sample (default: 0)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what they continue (default: nothing)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=120, metavar="N", help="tokens of each (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from hope_megatron.report.run_page import read_run, write_page

    if not args.run.is_dir():
        raise ModelReferenceError(f"{args.run} is no run directory; name one, for example runs/my_run")
    if args.samples < 0 or args.max_new_tokens < 1:
        raise ModelReferenceError("--samples must not be negative, and --max-new-tokens must be positive")
    found = read_run(args.run)
    if args.json:
        print(json.dumps(found.facts, indent=1))
        return 0
    out = args.out or args.run / "report.html"
    samples = _samples(args) if args.samples else []
    write_page(found, out, samples)
    print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB, nothing beside it")
    return 0


def _samples(args: argparse.Namespace) -> list[str]:
    """Continuations of the prompt by the newest checkpoint."""
    from hope_megatron.cli.models import prepare_process

    prepare_process(None)
    import torch

    from hope_megatron.convert.open_model import open_model
    from hope_megatron.generation.complete import complete
    from hope_megatron.generation.sampling import SamplingOptions

    opened = open_model(str(args.run))
    return complete(
        opened.model,
        opened.tokenizer,
        args.prompt,
        num_samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        options=SamplingOptions(temperature=0.8, top_p=0.95),
        rng=torch.Generator().manual_seed(0),
    )
