"""What `hope rehearse` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from hope_megatron.cli.tables import new_table
from hope_megatron.config.roofline import LIMIT_IN_WORDS
from hope_megatron.runtime.formatting import bytes_text, count_text, percent_text, seconds_text

_WAITS_SHOWN = 8


def print_verdict(found: dict[str, Any], console: Console | None = None) -> None:
    """All figures of one configuration."""
    console = console or Console(highlight=False)
    console.print(
        f"[bold]{found['name']}[/bold] · rank {found['rank']} of {found['world_size']} x {found['hardware']} · "
        f"{found['accumulation_steps']} micro-batches of {found['micro_batch_size']} x {found['seq_length']} tokens\n",
        soft_wrap=True,
    )
    for table in (_phases(found), _memory(found), _alive(found), _collectives(found), _waits(found)):
        if table is not None:
            console.print(table, "")
    console.print(
        f"[bold]Step[/bold] {seconds_text(found['step_s'])}, bound by {LIMIT_IN_WORDS[found['limit']]}: "
        f"[bold]{found['tokens_per_second']:,.0f} tokens/s per GPU[/bold]\n"
        f"{found['kernels_per_micro_batch']:,} kernels per micro-batch, {found['kernels_per_step']:,} per step "
        f"({seconds_text(found['launch_s'])} to launch); {bytes_text(found['bytes_moved'])} moved; "
        + ", ".join(f"{count_text(value)}FLOP in {dtype}" for dtype, value in found["flops_by_dtype"].items())
        + _sharing_text(found)
        + "\n\n[bold]What this cannot see[/bold]\n"
        + "\n".join(f"  {line}" for line in found["cannot_see"]),
        soft_wrap=True,
    )
    if not found["fits"]:
        console.print(
            "[bold red]Does not fit[/bold red] with a tenth to spare: lower training.micro_batch_size, set "
            "training.recompute=layer, or raise parallel.tensor_parallel or zero_stage."
        )


def _sharing_text(found: dict[str, Any]) -> str:
    """How ranks share a sequence, or could."""
    text = ""
    if (sent := found["sequence_exchange"]) is not None:
        text += "\na rank sends per token and layer in forward: " + ", ".join(
            f"{name} {bytes_text(size)}" for name, size in sent.items()
        )
    if (passed := found["passing_states"]) is not None:
        text += (
            f"\n\n[bold]Passing states over {passed['ranks']} ranks (not built)[/bold]\n"
            f"the step above is that of a slice of the tokens; {bytes_text(passed['state_bytes'])} of states would go from rank to "
            f"rank in each pass, {bytes_text(passed['bytes_per_step'])} a step, and ranks would wait for each other "
            f"{seconds_text(passed['serial_s'])}: step {seconds_text(passed['step_s'])}, "
            f"{passed['tokens_per_second']:,.0f} tokens/s per GPU"
        )
    return text


def print_comparison(a: dict[str, Any], b: dict[str, Any], console: Console | None = None) -> None:
    """The main figures of two configurations side by side."""
    console = console or Console(highlight=False)
    table = new_table("", "", a["name"], b["name"], "")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("tokens/s per GPU", "tokens_per_second", lambda x: f"{x:,.0f}"),
        ("step", "step_s", seconds_text),
        ("bound", "limit", LIMIT_IN_WORDS.__getitem__),
        ("kernels per micro-batch", "kernels_per_micro_batch", lambda x: f"{x:,}"),
        ("kernels per step", "kernels_per_step", lambda x: f"{x:,}"),
        ("launch time", "launch_s", seconds_text),
        ("bytes moved", "bytes_moved", bytes_text),
        ("peak memory", "peak_memory_bytes", bytes_text),
        ("host waits per step", "host_waits_per_step", str),
    ]
    for label, key, form in rows:
        table.add_row(label, form(a[key]), form(b[key]), _ratio(a[key], b[key]))
    for dtype in dict.fromkeys([*a["flops_by_dtype"], *b["flops_by_dtype"]]):
        x, y = a["flops_by_dtype"].get(dtype, 0.0), b["flops_by_dtype"].get(dtype, 0.0)
        table.add_row(f"FLOPs in {dtype}", count_text(x), count_text(y), _ratio(x, y))
    for phase in dict.fromkeys([*a["phases"], *b["phases"]]):
        x, y = (found["phases"].get(phase, {}).get("total_s", 0.0) for found in (a, b))
        table.add_row(phase, seconds_text(x), seconds_text(y), _ratio(x, y))
    for name in a["peak_memory_breakdown"]:
        x, y = a["peak_memory_breakdown"][name], b["peak_memory_breakdown"].get(name, 0)
        table.add_row(f"memory, {name}", bytes_text(x), bytes_text(y), _ratio(x, y))
    x, y = (sum(c["bytes"] for c in found["collectives"] if c["way"] == "exposed") for found in (a, b))
    table.add_row("exposed collectives", bytes_text(x), bytes_text(y), _ratio(x, y))
    console.print(table)
    console.print(f"\ncounted for {a['world_size']} and {b['world_size']} x {a['hardware']}, not measured")


def _phases(found: dict[str, Any]) -> Table:
    table = new_table("Time of a step", "", "kernels", "to launch", "on the device", "network", "takes")
    for name, phase in found["phases"].items():
        table.add_row(
            name,
            f"{phase['kernels']:,}",
            seconds_text(phase["launch_s"]),
            seconds_text(found["roofline_s_by_phase"][name]),
            seconds_text(phase["network_s"]) if phase["network_s"] else "",
            seconds_text(phase["total_s"]),
        )
    return table


def _memory(found: dict[str, Any]) -> Table:
    table = new_table(f"Memory at the peak ({found['peak_at']})", "", "bytes", "share")
    for name, size in found["peak_memory_breakdown"].items():
        table.add_row(name, bytes_text(size), percent_text(size / found["peak_memory_bytes"]))
    table.add_row("[bold]total[/bold]", f"[bold]{bytes_text(found['peak_memory_bytes'])}[/bold]", "")
    if found["host_memory_bytes"]:
        table.add_row("in host memory", bytes_text(found["host_memory_bytes"]), "")
    return table


def _alive(found: dict[str, Any]) -> Table | None:
    if not found["alive_at_peak"]:
        return None
    table = new_table("Alive at the peak, by what made it", "", "bytes")
    for label, size in found["alive_at_peak"][:8]:
        table.add_row(label, bytes_text(size))
    return table


def _collectives(found: dict[str, Any]) -> Table | None:
    if not found["collectives"]:
        return None
    table = new_table("Collectives of a step", "phase", "operator", "group", "count", "bytes", "time", "")
    for row in found["collectives"]:
        group = f"{row['group']} ({row['ranks']})"
        table.add_row(
            row["phase"],
            row["operator"],
            group,
            f"{row['count']:g}",
            bytes_text(row["bytes"]),
            seconds_text(row["seconds"]),
            row["way"],
        )
    return table


def _waits(found: dict[str, Any]) -> Table:
    table = new_table(f"The host waits {found['host_waits_per_step']} times a step", "where", "times")
    for where, count in list(found["host_waits"].items())[:_WAITS_SHOWN]:
        table.add_row(where, f"{count:,}")
    return table


def _ratio(x: Any, y: Any) -> str:
    if isinstance(x, str) or not y or x == y:
        return ""
    return f"{x / y:.2f} x"
