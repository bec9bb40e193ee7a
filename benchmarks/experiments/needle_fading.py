"""What fades a needle: the filler's writes, or forgetting? A trained model reads again with either switched off by hand.

    python benchmarks/experiments/needle_fading.py    HOPE of today's defaults, multi-key, seeds 0 and 1
    python benchmarks/experiments/needle_fading.py --kind multi-value --json fading.json
    python benchmarks/experiments/needle_fading.py --hope memory.input_scale=0.3 memory.alpha_init=0.99999

Models are trained as `hope eval suite needles --steps 400` does, but HOPE with its defaults where --hope does not say otherwise; at
the first length, and asked at the last. Filler counts as such from the sixth token behind a needle on, so that the short
convolution has left the needle behind. Printed with them: the rates of every kind of token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from learning import start

from hope_megatron.testing.benchmark import machine, write_json  # before torch: sets OpenMP's wait policy

import numpy as np  # isort: skip
import torch

from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.model import LanguageModel
from hope_megatron.suites.fit import fit_options, fit_task, score
from hope_megatron.suites.models import small_hope, suite_model
from hope_megatron.suites.needles import ASK, FILLER, KEYS, MARK, VALUES, Kind, needle_tasks
from hope_megatron.suites.suite import SuiteOptions
from hope_megatron.suites.task import Task

OFF = {"eta": -30.0, "alpha": 30.0}  # added to a logit: writes nothing, forgets nothing
NEAR = 5  # tokens behind a needle that are not yet taken as filler
CASES = {
    "as trained": ((), None),
    "filler does not write": (("eta",), None),
    "filler does not forget": (("alpha",), None),
    "neither": (("eta", "alpha"), None),
    "neither, in the first layer only": (("eta", "alpha"), 0),
    "neither, in the second layer only": (("eta", "alpha"), 1),
}


def main() -> None:
    args = parse()
    start(args.threads)
    task = {task.name: task for task in needle_tasks(tuple(args.lengths))}[args.kind]
    base = small_hope(task.vocab_size, width=64, layers=2, heads=2, chunk_tokens=16)
    config = suite_model(args.family, base, tuple(args.hope))
    fitting = fit_options(SuiteOptions(steps=args.steps), args.steps, optimizer="m3")
    rows = []
    for seed in range(args.seeds):
        model, _ = fit_task(config, task, fitting, seed)
        rows.append(look(model, task, seed, args.sequences))
        show(rows[-1])
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="hope")
    parser.add_argument("--kind", choices=get_args(Kind), default="multi-key")
    parser.add_argument("--hope", nargs="+", default=[], metavar="KEY=VALUE", help="settings of HOPE")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 8192], help="trained, ..., asked (default: 128 8192)"
    )
    parser.add_argument("--sequences", type=int, default=32, help="haystacks asked (default: 32)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def look(model: LanguageModel, task: Task, seed: int, sequences: int) -> dict[str, Any]:
    """Share of questions answered without a mistake at the last length in every case, and the mean rates by kind of token."""
    mixers = [module for module in model.modules() if isinstance(module, MemoryMixer)]
    far = torch.from_numpy(is_filler(task.test_batch(task.bins[-1], sequences).tokens)).float()
    shares = {}
    for case, (silenced, layer) in CASES.items():
        chosen = mixers if layer is None else mixers[layer : layer + 1]
        with rates_changed(chosen, {name: OFF[name] * far for name in silenced}):
            shares[case] = score(model, task, task.bins[-1], sequences)
    return {"seed": seed, "length": task.bins[-1], "share": shares, "rates": rates(model, mixers, task, sequences)}


def is_filler(tokens: np.ndarray) -> np.ndarray:
    """[B, T] -> whether a token is filler, some tokens behind anything else."""
    other = (tokens < FILLER.start) | (tokens >= FILLER.stop)
    near = other.copy()
    for distance in range(1, NEAR + 1):
        near[:, distance:] |= other[:, :-distance]
    return ~near


@contextmanager
def rates_changed(mixers: list[MemoryMixer], added: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add to the logits of rates, [B, T] each, while sequences are streamed once."""

    def hook(mixer: MemoryMixer, added: dict[str, torch.Tensor]):
        position = 0

        def change(module, inputs, output):
            nonlocal position
            logits, bias = output
            by_rate = logits.unflatten(-1, (len(mixer.rate_names), -1)).clone()  # [T, B, rates, H]
            for name in added.keys() & set(mixer.rate_names):
                piece = added[name][:, position : position + len(logits)]
                by_rate[:, :, mixer.rate_names.index(name)] += piece.T[..., None]
            position += len(logits)
            return by_rate.flatten(2), bias

        return mixer.rates.register_forward_hook(change)

    handles = [hook(mixer, added) for mixer in mixers if mixer.rates is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rates(model: LanguageModel, mixers: list[MemoryMixer], task: Task, sequences: int) -> list[dict[str, Any]]:
    """Mean rates before the self-memories' part, by layer, rate and kind of token, a figure per head; at the trained length."""
    batch = task.test_batch(task.bins[0], sequences)
    kinds = {
        "filler": is_filler(batch.tokens),
        "mark": batch.tokens == MARK,
        "key": np.isin(batch.tokens, KEYS),
        "value": np.isin(batch.tokens, VALUES),
        "question": batch.tokens == ASK,
    }
    given: list[tuple] = []
    for mixer in mixers:
        mixer.observer = lambda *inputs: given.append(inputs)
    model(torch.from_numpy(batch.tokens))
    for mixer in mixers:
        mixer.observer = None
    rows = []
    for number, inputs in enumerate(given):
        logits, rule = inputs[3], inputs[5]
        found = {}
        if logits.eta is not None:
            found["eta"] = rule.eta_max * torch.sigmoid(logits.eta)
        if logits.alpha is not None:
            found["1 - alpha"] = torch.sigmoid(-logits.alpha)
        for name, value in found.items():
            means = {kind: value[torch.from_numpy(where)].mean(0).tolist() for kind, where in kinds.items()}
            rows.append({"layer": number, "rate": name, **means})
    return rows


def show(row: dict[str, Any]) -> None:
    print(f"\nseed {row['seed']}: share without a mistake at {row['length']}")
    for case, value in row["share"].items():
        print(f"  {case:<36} {value:.2f}")
    print("  mean rates, a figure per head:")
    for rate in row["rates"]:
        means = "; ".join(
            f"{kind} {', '.join(f'{value:.2g}' for value in values)}"
            for kind, values in rate.items()
            if kind not in ("layer", "rate")
        )
        print(f"  layer {rate['layer']} {rate['rate']:<9} {means}", flush=True)


if __name__ == "__main__":
    main()
