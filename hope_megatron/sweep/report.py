"""The report of a sweep: Markdown and one HTML page, with pictures, tables as CSV, and run files for what it recommends."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hope_megatron.config.load import dump_config
from hope_megatron.eval.token_kinds import KINDS, METRICS
from hope_megatron.report.document import Block, Bullets, Code, Heading, Picture, Table, Text, to_html, to_markdown
from hope_megatron.runtime.files import replacing, write_json, write_text
from hope_megatron.sweep import plots
from hope_megatron.sweep.analysis import SINGLE_EPOCH, FamilyAnalysis
from hope_megatron.sweep.bootstrap import Estimate
from hope_megatron.sweep.collect import Observation, write_csv
from hope_megatron.sweep.frontier import SAME_COMPUTE
from hope_megatron.sweep.hyper import grid_steps_moved
from hope_megatron.sweep.recommend import Recommendation

FAR_EXTRAPOLATION = 30.0
"""Beyond this many times the largest run a law is a guess."""


def write_report(
    title: str,
    folder: Path,
    observations: Sequence[Observation],
    families: Sequence[FamilyAnalysis],
    recommendations: Sequence[Recommendation],
    flops: float,
    *,
    missing: Sequence[str] = (),
) -> Path:
    """Write report.md, report.html, their pictures, cells.csv, coefficients.csv, fit.json and the recommended run files.

    Args:
        title: name of the sweep.
        folder: where to write.
        observations: every finished run.
        families: their analysis.
        recommendations: best first.
        flops: the compute that the recommendation is for.
        missing: lines about cells that did not finish.

    Returns:
        The HTML page.
    """
    pictures = folder / "plots"
    pictures.mkdir(parents=True, exist_ok=True)
    write_csv(observations, folder / "cells.csv")
    coefficients = [row for family in families for row in coefficient_rows(family)]
    _write_rows(folder / "coefficients.csv", ("family", "law", "coefficient", "value", "low", "high"), coefficients)
    write_json(folder / "fit.json", summary(families, flops))
    for one in recommendations:
        write_text(folder / f"{one.config.name}.yaml", dump_config(one.config))
    blocks = [
        *_recommendation(recommendations, flops, folder),
        *_families(families, flops, pictures),
        *_kinds(families),
        *_laws(families, pictures),
        *_checks(families, pictures),
        *_tuning(families, pictures),
        *_runs(families, pictures, missing),
    ]
    name = f"Scaling laws: {title}"
    write_text(folder / "report.md", to_markdown(name, blocks, folder))
    write_text(folder / "report.html", to_html(name, blocks))
    return folder / "report.html"


def coefficient_rows(family: FamilyAnalysis) -> list[tuple[str, str, str, Estimate]]:
    """(family, law, coefficient, estimate) of everything that was fitted."""
    rows: list[tuple[str, str, str, Estimate]] = []

    def add(law: str, resampled: Any, quantities: dict[str, Any]) -> None:
        rows.extend((family.family, law, name, resampled.estimate(quantity)) for name, quantity in quantities.items())

    if family.law is not None:
        add("approach 3", family.law, {name: _attribute(name) for name in ("E", "A", "B", "alpha", "beta")})
        add(
            "approach 3",
            family.law,
            {"a": lambda law: law.exponents(family.compute)[0], "b": lambda law: law.exponents(family.compute)[1]},
        )
    for law, frontier in (("approach 2", family.isoflop), ("approach 1", family.envelope)):
        if frontier is not None:
            add(law, frontier, {"a": lambda fit: fit.parameters.exponent, "b": lambda fit: fit.tokens.exponent})
    if family.data_constrained is not None:
        add("data-constrained", family.data_constrained, {name: _attribute(name) for name in ("R_D", "R_N")})
    for law, tuning in (("learning rate", family.lr_law), ("batch tokens", family.batch_law)):
        if tuning is not None:
            add(
                law,
                tuning,
                {
                    "factor of C": lambda fit: fit.by_compute.factor,
                    "exponent of C": lambda fit: fit.by_compute.exponent,
                },
            )
            if math.isfinite(tuning.point.factor):
                add(law, tuning, {name: _attribute(name) for name in ("factor", "n_exponent", "d_exponent")})
    return rows


def summary(families: Sequence[FamilyAnalysis], flops: float) -> dict[str, Any]:
    """Everything fitted, as plain data; numbers that do not exist are null."""
    result: dict[str, Any] = {"target_flops": flops, "families": {}}
    for family in families:
        laws: dict[str, Any] = {}
        for _, law, name, estimate in coefficient_rows(family):
            laws.setdefault(law, {})[name] = _plain(estimate)
        optimum = family.optimum(flops) or {}
        result["families"][family.family] = {
            "flops_per_token": {"kappa": family.compute.kappa, "exponent": family.compute.exponent},
            "laws": laws,
            "optimum": {quantity: _plain(best) for quantity, best in optimum.items()} or None,
            "outliers": [outlier.name for outlier in family.outliers],
            "heldout": [
                {
                    "name": check.name,
                    "measured": check.measured,
                    "predicted": _plain(check.predicted),
                    "error": check.error,
                }
                for check in family.heldout
            ],
            "notes": family.notes,
        }
    return result


def _recommendation(recommendations: Sequence[Recommendation], flops: float, folder: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Recommendation")]
    if not recommendations:
        return [
            *blocks,
            Text(
                "No family has a loss law with an optimum, so there is nothing to recommend; the notes below say what is missing."
            ),
        ]
    best = recommendations[0]
    blocks.append(
        Text(
            f"For **{flops:.3g} training FLOPs**: **{best.family}** with **{_count(best.parameters.value)} parameters** on "
            f"**{_count(best.tokens.value)} tokens**, learning rate **{best.config.optim.lr:.3g}** ({best.lr_reason}). "
            f"Expected loss **{interval_text(best.loss)}** nats per token."
        )
    )
    if len(recommendations) > 1:
        second = recommendations[1]
        apart = best.loss.high < second.loss.low
        blocks.append(
            Text(
                f"{second.family} comes second with {interval_text(second.loss)}; the intervals "
                + ("do not overlap." if apart else "overlap, so this sweep does not decide between the two.")
            )
        )
    if not math.isfinite(best.parameters.low):
        blocks.append(
            Text(
                "**The runs do not determine the optimum**: its interval is unbounded. Take it as a direction at most, and "
                "widen the range of sizes and tokens."
            )
        )
    if best.epochs > SINGLE_EPOCH:
        blocks.append(
            Text(
                f"Its tokens are {best.epochs:.2g} passes over the data of this sweep, and the law speaks of fresh tokens: "
                "prepare more data first, or expect a higher loss."
            )
        )
    if best.extrapolation > FAR_EXTRAPOLATION:
        blocks.append(
            Text(
                f"This is {best.extrapolation:.0f} times the compute of the largest run: a guess. Run a larger sweep first."
            )
        )
    rows = [_recommendation_row(one) for one in recommendations]
    file = folder / f"{best.config.name}.yaml"
    return [
        *blocks,
        Table(
            (
                "family",
                "width x layers",
                "optimal parameters",
                "optimal tokens",
                "steps",
                "learning rate",
                "expected loss",
                "run file",
            ),
            rows,
        ),
        Code(f"hope plan {file}\nhope train {file}"),
    ]


def _recommendation_row(one: Recommendation) -> list[str]:
    config = one.config
    return [
        one.family,
        f"{config.model.hidden_size} x {config.model.num_layers}",
        interval_text(one.parameters, _count),
        interval_text(one.tokens, _count),
        str(config.training.steps),
        f"{config.optim.lr:.3g}",
        interval_text(one.loss),
        f"`{config.name}.yaml`",
    ]


def _families(families: Sequence[FamilyAnalysis], flops: float, pictures: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Families at equal compute")]
    spent = [run.flops for family in families for run in family.fresh]
    shown = [min(spent), math.sqrt(min(spent) * max(spent)), max(spent), flops] if spent else [flops]
    rows = []
    for family in families:
        cells = [family.optimum(budget) for budget in shown]
        rows.append([family.family, *("-" if cell is None else interval_text(cell["loss"]) for cell in cells)])
    blocks.append(Table(("expected loss at the optimum", *(f"{budget:.2g} FLOPs" for budget in shown)), rows))
    if plots.plot_frontier(families, flops, pictures / "frontier.png"):
        blocks.append(
            Picture(
                pictures / "frontier.png",
                "What compute buys: loss with the runs as dots, optimal size and tokens. Bands: approach 3.",
            )
        )
    return blocks


def _kinds(families: Sequence[FamilyAnalysis]) -> list[Block]:
    """The best run of each family by kind of token, at the largest compute where the best runs of all have been measured so."""
    for flops in sorted({run.flops for family in families for run in family.fresh}, reverse=True):
        at_equal = [[r for r in f.fresh if abs(math.log(r.flops / flops)) <= SAME_COMPUTE] for f in families]
        best = [min(runs, key=lambda run: run.loss) for runs in at_equal if runs]
        if len(best) == len(families) and all(len(run.kinds) == len(METRICS) for run in best):
            return _kinds_at(flops, sorted(best, key=lambda run: run.loss))
    return []


def _kinds_at(flops: float, best: Sequence[Observation]) -> list[Block]:
    rows = [
        [run.family, run.name, *(f"{loss:.4f}" for loss in (run.loss, *map(run.kinds.get, METRICS)))] for run in best
    ]
    return [
        Heading("Where the context repeats itself"),
        Text(f"Held-out loss at {flops:.2g} FLOPs, by what a token completes with those before it in its sequence."),
        Table(("family", "best run", "all", *KINDS), rows),
    ]


def _laws(families: Sequence[FamilyAnalysis], pictures: Path) -> list[Block]:
    blocks: list[Block] = [
        Heading("Laws"),
        Text(
            "L(N, D) = E + A / N^alpha + B / D^beta (approach 3); N_opt ~ C^a and D_opt ~ C^b "
            "from the minima of isoFLOP parabolas (approach 2) and from the envelope of the training curves (approach 1). "
            "Intervals are bootstrapped."
        ),
    ]
    rows = [
        [name, law, coefficient, interval_text(estimate)]
        for f in families
        for name, law, coefficient, estimate in coefficient_rows(f)
    ]
    blocks.append(Table(("family", "law", "coefficient", "value"), rows))
    if plots.plot_profiles(families, pictures / "profiles.png"):
        blocks.append(Picture(pictures / "profiles.png", "IsoFLOP profiles; stars are minima that count."))
    for family in families:
        if family.notes:
            blocks += [Text(f"Notes on **{family.family}**:"), Bullets(family.notes)]
    return blocks


def _checks(families: Sequence[FamilyAnalysis], pictures: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Checks")]
    checks = [(family.family, check) for family in families for check in family.heldout]
    if checks:
        blocks.append(Text("The law fitted without the largest budget, against the runs of that budget:"))
        rows = [
            [
                check.name,
                f"{check.measured:.4f}",
                interval_text(check.predicted),
                f"{100 * check.error:+.2f} %",
                "yes" if check.covered else "no",
            ]
            for _, check in checks
        ]
        blocks.append(Table(("run", "measured", "predicted", "error", "inside"), rows))
    outliers = [(family.family, outlier) for family in families for outlier in family.outliers]
    blocks.append(
        Bullets(
            [
                f"outlier: `{o.name}` lies {100 * math.expm1(o.log_residual):+.2f} % off the law "
                f"({o.scales:.1f} robust standard deviations); it is left out of all laws and intervals"
                for _, o in outliers
            ]
        )
        if outliers
        else Text("No outliers.")
    )
    if plots.plot_residuals(families, pictures / "residuals.png"):
        blocks.append(Picture(pictures / "residuals.png", "Residuals of the loss law; outliers are named."))
    return blocks


def _tuning(families: Sequence[FamilyAnalysis], pictures: Path) -> list[Block]:
    blocks: list[Block] = []
    for kind, label in (("lr", "learning rate"), ("batch", "batch tokens")):
        path = pictures / f"{kind}.png"
        if not plots.plot_valleys(families, kind, label, path):
            continue
        blocks += [Heading(f"Optimal {label}"), Picture(path, f"Loss against {label}; stars are minima that count.")]
        rows = []
        for family in families:
            for tuned in getattr(family, f"{kind}_valleys"):
                best = f"{tuned.valley.minimum[0]:.3g}" if not tuned.valley.problem else f"- ({tuned.valley.problem})"
                rows.append([family.family, str(tuned.width), _count(tuned.parameters), _count(tuned.tokens), best])
        blocks.append(Table(("family", "width", "parameters", "tokens", f"best {label}"), rows))
        for family in families:
            moved = grid_steps_moved(getattr(family, f"{kind}_valleys"))
            if math.isfinite(moved):
                blocks.append(
                    Text(
                        f"{family.family}: over all sizes and lengths the optimum moves by {moved:.2f} steps of the grid."
                    )
                )
    return blocks


def _runs(families: Sequence[FamilyAnalysis], pictures: Path, missing: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Heading("Runs")]
    if plots.plot_curves(families, pictures / "curves.png"):
        blocks.append(Picture(pictures / "curves.png", "Training loss against compute."))
    rows = [
        [run.name, _count(run.parameters), _count(run.tokens), f"{run.flops:.3g}", f"{run.loss:.4f}"]
        for family in families
        for run in family.runs
    ]
    blocks.append(Table(("run", "parameters", "tokens", "FLOPs", "loss"), rows))
    if missing:
        blocks += [Text("Not in this report:"), Bullets(missing)]
    return blocks


def _attribute(name: str) -> Any:
    return lambda fit: getattr(fit, name)


def interval_text(estimate: Estimate, form: Callable[[float], str] = "{:.4g}".format) -> str:
    """1.234 (1.1 to 1.3)."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return f"{form(estimate.value)} (no interval)"
    return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in vars(estimate).items()}


def _write_rows(path: Path, header: Sequence[str], rows: Sequence[tuple[str, str, str, Estimate]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows((*names, estimate.value, estimate.low, estimate.high) for *names, estimate in rows)
