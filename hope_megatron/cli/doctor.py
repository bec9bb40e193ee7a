"""What this machine has, what is missing, and what to do about it.

Exit code 1 only if something that every run needs is missing.

Examples:

    hope doctor                     a line for each thing, with advice where something is wrong
    hope doctor --kernels hope      also check the Triton kernels of a family
    hope doctor --json              for programs, and for bug reports
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hope_megatron.config.environment import fused_kernels, installed_versions, step_libraries
from hope_megatron.doctor.fabric import check_fabric
from hope_megatron.doctor.finding import MISSING, NOTE, OK, WARNING, Finding
from hope_megatron.doctor.kernels import check_memory_kernel, check_triton_kernels
from hope_megatron.doctor.machine import check_machine, check_slurm
from hope_megatron.doctor.packages import check_distributions, check_python
from hope_megatron.doctor.torch_here import check_driver, check_torch, driver_version, probe_torch
from hope_megatron.runtime.apex import detect_apex
from hope_megatron.runtime.libraries import Choice

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--kernels",
        nargs="*",
        metavar="FAMILY",
        help="also compile the Triton kernels of memories and hold them against PyTorch: of every family, or of those named "
        "(hope hope_w1). Minutes on a GPU; without one under Triton's interpreter, small",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    torch = probe_torch()
    findings = [
        *check_python(),
        *check_distributions(),
        *check_torch(torch),
        *check_driver(torch, driver_version()),
        *([] if "error" in torch else check_memory_kernel()),
        *check_machine(),
        *check_slurm(),
        *check_fabric(),
    ]
    cuda = bool(torch.get("devices"))
    if args.kernels is not None and "error" not in torch:
        findings += check_triton_kernels(args.kernels, cuda=cuda)
    kernels, libraries = fused_kernels(cuda=cuda), step_libraries(cuda=cuda)
    apex = detect_apex()
    if apex.kind == "other":
        findings.append(Finding("apex", WARNING, apex.describe()))
    if args.json:
        report = {
            "findings": [asdict(finding) for finding in findings],
            "versions": installed_versions(),
            "torch": torch,
            "kernels": [asdict(kernel) for kernel in kernels],
            "libraries": [choice.record() for choice in libraries],
            "apex": {"kind": apex.kind, "location": apex.location, "provides": dict(apex.provides)},
            "ok": not _anything_missing(findings),
        }
        print(json.dumps(report, indent=2))
    else:
        _print(findings, kernels, libraries)
    return 1 if _anything_missing(findings) else 0


def _anything_missing(findings: list[Finding]) -> bool:
    return any(finding.status == MISSING for finding in findings)


def _print(findings: list[Finding], kernels: list[Any], libraries: list[Choice]) -> None:
    from rich.console import Console

    marks = {
        OK: "[green]ok[/green]",
        NOTE: "[dim]note[/dim]",
        WARNING: "[yellow]warning[/yellow]",
        MISSING: "[red]missing[/red]",
    }
    console = Console(highlight=False)
    _print_rows(console, (row for finding in findings for row in _rows(finding, marks[finding.status])))
    console.print("\n[bold]Fused kernels[/bold]")
    in_use = {True: "[green]in use[/green]", False: "[dim]not used[/dim]"}
    _print_rows(console, ((in_use[bool(kernel.in_use)], kernel.name, kernel.why) for kernel in kernels))
    console.print("\n[bold]Parts of a step (training.libraries)[/bold]")
    _print_rows(
        console,
        (
            (choice.part, choice.library.name, "; ".join(f"not {reason}" for reason in choice.passed_over))
            for choice in libraries
        ),
    )
    missing = sum(finding.status == MISSING for finding in findings)
    warnings = sum(finding.status == WARNING for finding in findings)
    verdict = f"[red]{missing} missing[/red]" if missing else "[green]Ready.[/green]"
    console.print(f"\n{verdict}" + (f" {warnings} warning{'s' if warnings > 1 else ''}." if warnings else ""))


def _rows(finding: Finding, mark: str) -> Iterator[tuple[str, str, str]]:
    yield mark, finding.topic, finding.text
    if finding.advice:
        yield "", "", f"[bold]-> {finding.advice}[/bold]"


def _print_rows(console: Console, rows: Iterable[tuple[str, str, str]]) -> None:
    """Two short columns, and one of text that may take several lines."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
