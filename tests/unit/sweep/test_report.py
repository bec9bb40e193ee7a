from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config import load_run_config
from hope_megatron.config.accounting import num_parameters
from hope_megatron.eval.token_kinds import METRICS
from hope_megatron.report.document import Table, to_html
from hope_megatron.sweep.analysis import analyse
from hope_megatron.sweep.collect import Observation, read_csv
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import CHINCHILLA, LossLaw
from hope_megatron.sweep.plan import Plan, make_plan
from hope_megatron.sweep.plots import _panels
from hope_megatron.sweep.recommend import recommend, target_flops
from hope_megatron.sweep.report import write_report
from hope_megatron.sweep.schema import load_sweep

HOPE = LossLaw(E=1.0, A=406.4, B=410.7, alpha=0.34, beta=0.28)


@pytest.fixture
def plan(sweep_file: Callable[..., Path]) -> Plan:
    sizes = {"flops_per_token": [2e6, 4e6, 8e6, 1.6e7], "depths": [2, 2, 3, 4], "head_size": 16}
    return make_plan(
        load_sweep(sweep_file(sizes=sizes, design={"isoflop_budgets": [1e13, 1e14, 1e15]}, fit={"bootstrap": 20}))
    )


def observed(plan: Plan) -> list[Observation]:
    """What the cells would measure if the families followed their laws."""
    return [
        Observation(
            name=cell.name,
            family=cell.family,
            parameters=float(cell.num_parameters),
            tokens=float(cell.tokens),
            flops=cell.flops,
            loss=float((HOPE if cell.family == "hope" else CHINCHILLA)(cell.num_parameters, cell.tokens)),
            width=cell.config.model.hidden_size,
            base_lr=cell.config.optim.lr,
        )
        for cell in plan.cells
    ]


def test_recommended_run_is_the_optimum_of_the_best_family(plan: Plan) -> None:
    families = analyse(observed(plan), plan.sweep.fit)
    first, second = recommend(plan, families, 1e16)
    assert (first.family, second.family) == ("hope", "transformer_pp")
    assert first.flops == pytest.approx(1e16, rel=0.01)
    hope = next(family for family in families if family.family == "hope")
    optimum = HOPE.optimum(1e16, hope.compute)
    assert first.parameters.value == pytest.approx(optimum.parameters, rel=0.02)
    assert num_parameters(first.config.model) == pytest.approx(optimum.parameters, rel=0.25)  # the nearest width
    assert first.loss.value == pytest.approx(optimum.loss, rel=0.01)
    assert first.config.optim.lr == 1e-2 and "only rate" in first.lr_reason
    assert first.extrapolation == pytest.approx(10, rel=0.05) == target_flops(families, None) / 1e15


def test_recommendation_beyond_the_data_says_so(plan: Plan, tmp_path: Path) -> None:
    longest = max(run.tokens for run in observed(plan))
    for data, warned in ((longest, True), (1000 * longest, False)):
        observations = [replace(run, unique_tokens=data) for run in observed(plan)]
        families = analyse(observations, plan.sweep.fit)
        write_report("toy", tmp_path, observations, families, recommend(plan, families, 1e18), 1e18)
        assert ("passes over the data" in (tmp_path / "report.md").read_text()) is warned


def test_report_is_complete_and_self_contained(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observations = observed(plan)
    families = analyse(observations, plan.sweep.fit)
    recommendations = recommend(plan, families, 1e16)
    page = write_report("toy", tmp_path, observations, families, recommendations, 1e16, missing=["`cell`: set aside"])
    text = page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [] and text.count("data:image/png;base64,") >= 3
    markdown = (tmp_path / "report.md").read_text()
    for words in ("## Recommendation", "Families at equal compute", "approach 3", "set aside", "inside"):
        assert words in markdown, words
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    config = load_run_config(tmp_path / "toy-hope-recommended.yaml")
    assert config == recommendations[0].config
    fitted = json.loads((tmp_path / "fit.json").read_text())["families"]["hope"]["laws"]["approach 3"]
    assert fitted["E"]["value"] == pytest.approx(1.0, abs=1e-3)
    with open(tmp_path / "coefficients.csv", newline="") as file:
        assert {row["law"] for row in csv.DictReader(file)} >= {"approach 2", "approach 3"}
    assert [o.loss for o in read_csv(tmp_path / "cells.csv")] == [o.loss for o in observations]
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "cells.csv").read_bytes())  # from a spreadsheet
    assert repr(read_csv(tmp_path / "bom.csv")) == repr(read_csv(tmp_path / "cells.csv"))  # NaN equals no NaN
    assert main(["sweep", "fit", str(tmp_path / "cells.csv"), "--bootstrap", "20", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["families"]["hope"]["laws"]["approach 3"]
    assert printed["E"]["value"] == fitted["E"]["value"]


def test_losses_on_what_repeats_are_compared_at_one_compute(plan: Plan, tmp_path: Path) -> None:
    """Of the best run of each at the largest compute that all have; a family without these losses stays out of nothing."""
    largest = max(run.flops for run in observed(plan))

    def measured(run: Observation) -> Observation:
        there = run.family == "hope" or run.flops < largest / 5  # transformer_pp lacks those of the largest
        return replace(run, kinds=dict(zip(METRICS, (run.loss + 1, run.loss, run.loss / 2))) if there else {})

    observations = [measured(run) for run in observed(plan)]
    families = analyse(observations, plan.sweep.fit)
    write_report("toy", tmp_path, observations, families, [], 1e16)
    _, _, table = (tmp_path / "report.md").read_text().partition("## Where the context repeats itself")
    rows = [line.split("|")[1:-1] for line in table.partition("##")[0].splitlines() if "-w" in line]
    middle = [run for run in observations if largest / 20 < run.flops < largest / 5]
    best = [
        min((run for run in middle if run.family == name), key=lambda run: run.loss)
        for name in ("hope", "transformer_pp")
    ]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [run.family, run.name, *(f"{loss:.4f}" for loss in (run.loss, run.loss + 1, run.loss, run.loss / 2))]
        for run in best
    ]
    write_report("toy", tmp_path, observations, analyse(observed(plan), plan.sweep.fit), [], 1e16)
    assert "Where the context" not in (tmp_path / "report.md").read_text()


def test_report_without_a_law_says_what_is_missing(plan: Plan, tmp_path: Path) -> None:
    observations = [replace(one, curve=None) for one in observed(plan)[:3]]
    families = analyse(observations, plan.sweep.fit)
    assert recommend(plan, families, 1e16) == []
    text = write_report("toy", tmp_path, observations, families, [], 1e16).read_text()
    assert "nothing to recommend" in text and "at least 6 finished runs" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameters,loss\n1,2\n", "tokens"),
        ("", "no rows"),
        ("parameters,tokens,loss\n1e6,1e7,2.0\n1e6,x,2.0\n", "line 3: tokens"),
        ("parameters,tokens,loss\n1e6,1e7,nan\n", "line 2: loss"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(SweepError, match=words):
        read_csv(tmp_path / "runs.csv")


@pytest.mark.parametrize(("count", "inches"), [(1, (5.5, 4)), (2, (10.5, 4)), (3, (10.5, 8)), (5, (10.5, 12))])
def test_panels_stay_readable_on_the_page(count, inches):
    """Three beside each other were shrunk to a third of the page's width."""
    figure, panels = _panels(count)
    assert len(panels) == count and tuple(figure.get_size_inches()) == inches
    assert all(axes.axison for axes in panels)


def test_a_wide_table_may_leave_the_column_of_text(tmp_path):
    page = to_html("t", [Table(tuple("abcdefghijkl"), [tuple("x" * 20 for _ in range(12))])])
    assert '<div class="table"><table>' in page and "max-width: calc(100vw - 2.4rem)" in page
    assert "@media print" in page
