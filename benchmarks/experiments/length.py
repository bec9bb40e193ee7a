"""Beyond its trained length a model's loss may rise: which part of the state is to blame?

    python benchmarks/experiments/length.py runs/quickstart/hope --times 32 --json length.json --png length.png

Held-out text is read in long rows, window by window of the trained length, and at each window's end something is done to the
memories' state: all of it, or one kind of memory, goes back to the learned initial state W_0; or it is pulled there half way; or
the rates are changed. What brings the loss back to that of short rows is what was to blame.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, write_json

import torch  # isort: skip  (after common has set OpenMP's wait policy)
import numpy as np
from torch import Tensor

from hope_megatron.convert.open_model import open_model
from hope_megatron.eval.heldout import heldout_tokens
from hope_megatron.eval.memory_health import memory_mixers, observed_memories
from hope_megatron.eval.report import save_figure
from hope_megatron.layers.memory_mixer import MemoryMixer, MemoryMixerState
from hope_megatron.model import ModelState
from hope_megatron.ops.memory import MemoryParams, MemoryState
from hope_megatron.ops.memory.types import map_params

BANKS = MemoryParams._fields
Change = Callable[[MemoryState, MemoryState], MemoryState]
"""(state at a window's end, initial state) -> the state to go on from."""


def put_back(*banks: str, share: float = 1.0) -> Change:
    """Move banks towards the initial state: W + share (W_0 - W)."""

    def change(state: MemoryState, initial: MemoryState) -> MemoryState:
        moved = map_params(lambda w, w0: torch.lerp(w, w0, share), state.now, initial.now)
        now = state.now._replace(**{name: getattr(moved, name) for name in banks})
        return state._replace(now=now, start=now)

    return change


def untouched(state: MemoryState, initial: MemoryState) -> MemoryState:
    """Go on as it is."""
    return state


# name: (what is done to the state after each window, alpha = 1 throughout, no writes beyond the trained length)
CASES: dict[str, tuple[Change, bool, bool]] = {
    "as it is": (untouched, False, False),
    "all memories back to W0": (put_back(*BANKS), False, False),
    "M_mem back to W0": (put_back("mem"), False, False),
    "M_k and M_v back to W0": (put_back("vector"), False, False),
    "M_eta and M_alpha back to W0": (put_back("scalar"), False, False),
    "all but M_mem back to W0": (put_back("vector", "scalar"), False, False),
    "alpha = 1": (untouched, True, False),
    "no writes beyond": (untouched, False, True),
    "half way to W0": (put_back(*BANKS, share=0.5), False, False),
    "half way to W0, alpha = 1": (put_back(*BANKS, share=0.5), True, False),
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    opened = open_model(args.model)
    window, length = opened.window_tokens, args.times * opened.window_tokens
    tokens = heldout_tokens(opened, None, args.data, args.rows * length)
    rows = torch.from_numpy(np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(args.rows)]))
    found = {name: read(opened.model, rows, window, *CASES[name], watch=args.watch) for name in args.cases}
    edges = [window * 2**i for i in range(args.times.bit_length())]
    spans = list(zip([0, *edges], edges))
    table = [[name, *(float(losses[:, a:b].mean()) for a, b in spans)] for name, (losses, _) in found.items()]
    print_table(["state", *(f"to {b:,}" for _, b in spans)], table)
    layers = {name: layers for name, (_, layers) in found.items()}
    if args.watch:
        print_rates(layers, window)
    results = {"machine": machine(), "arguments": vars(args), "trained_tokens": window, "spans": spans}
    results |= {"losses": {row[0]: row[1:] for row in table}, "windows": layers}
    write_json(args.json, {**results, "arguments": {key: str(value) for key, value in vars(args).items()}})
    if args.png:
        draw(args.png, table, edges, window)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run directory or an exported model")
    parser.add_argument("--data", type=Path, metavar="MANIFEST", help="default: the run's held-out split")
    parser.add_argument("--times", type=int, default=32, help="length of a row in trained lengths (a power of two)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--watch", action="store_true", help="also tell the mean inner learning rates, at twice the time"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    return parser.parse_args()


@torch.no_grad()
def read(model, rows: Tensor, window: int, change: Change, keep_all: bool, still: bool, *, watch: bool):
    """Losses [B, T], and by window and layer the size of M_mem's weights relative to W_0 and, if watched, the mean rate."""
    mixers, losses, layers, state = memory_mixers(model), [], [], None
    initial = model.init_state(len(rows))
    for number, piece in enumerate(rows[:, :-1].split(window, 1)):
        targets = rows[:, 1 + number * window : 1 + number * window + piece.size(1)]
        seen: dict[int, float] = {}
        keep = lambda layer, trace, seen=seen: seen.update({layer: float(trace.eta.mean())})  # noqa: E731
        look = observed_memories(model, keep) if watch else nullcontext()
        with changed_rates(mixers, alpha_one=keep_all or (still and number > 0), silent=still and number > 0), look:
            output = model(piece, targets=targets, state=state, return_state=True)
        losses.append(output.losses)
        state = ModelState(tuple(_changed(s, i, change) for s, i in zip(output.state.layers, initial.layers)))
        sizes = [_growth(s, i) for s, i in zip(output.state.layers, initial.layers)]
        layers.append([s and {**s, "eta": seen.get(n)} for n, s in enumerate(sizes, start=1)])
    return torch.cat(losses, 1), layers


def print_rates(layers: dict[str, list], window: int) -> None:
    """Mean inner learning rate of the windows that end at 1, 2, 4, ... trained lengths."""
    some = next(iter(layers.values()))
    ends = [2**i for i in range(len(some).bit_length())]
    rows = [
        [name, number + 1, *(windows[end - 1][number]["eta"] for end in ends)]
        for name, windows in layers.items()
        for number in range(len(some[0]))
        if some[0][number]
    ]
    print()
    print_table(["inner rate", "layer", *(f"at {window * end:,}" for end in ends)], rows)


def _changed(state: Any, initial: Any, change: Change) -> Any:
    if not isinstance(state, MemoryMixerState):
        return state
    return state._replace(memory=change(state.memory, initial.memory))


def _growth(state: Any, initial: Any) -> dict[str, float] | None:
    if not isinstance(state, MemoryMixerState):
        return None
    ratio = lambda x, y: float((x.flatten(2).norm(dim=2) / y.flatten(2).norm(dim=2)).mean())  # noqa: E731
    now, first = state.memory.now.mem, initial.memory.now.mem
    return {
        name: ratio(x, y) for name, x, y in (("input", now.w_in, first.w_in), ("output", now.w_out, first.w_out)) if x is not None
    }  # fmt: skip


@contextmanager
def changed_rates(mixers: list[MemoryMixer], *, alpha_one: bool, silent: bool):
    """Retention 1, and inner rates 0, whatever the token says."""
    own = MemoryMixer._rate_logits

    def rates(mixer: MemoryMixer, x: Tensor):
        logits = own(mixer, x)
        if alpha_one and logits.alpha is not None:
            logits = logits._replace(alpha=torch.full_like(logits.alpha, 60.0))
        if silent and logits.eta is not None:
            logits = logits._replace(eta=torch.full_like(logits.eta, -60.0))
        return logits

    MemoryMixer._rate_logits = rates
    try:
        yield
    finally:
        MemoryMixer._rate_logits = own


def draw(path: Path, table: list[list[Any]], edges: list[int], window: int) -> None:
    """Loss by position, a line per case."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, *losses) in enumerate(table):
        width, colour = (3, "black") if i == 0 else (1.6, colormaps["tab10"](i - 1))
        axes.plot(edges, losses, "o-", color=colour, linewidth=width, markersize=4, label=f"{name} ({losses[-1]:.2f})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.set_xlabel("up to this position in the context (tokens)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.axvline(window, color="#8c959f", linestyle=":")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
