from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config import ConfigError, load_model_config, load_run_config
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import check_budget, make_plan
from hope_megatron.sweep.schema import load_sweep
from hope_megatron.sweep.sizes import scale_to_flops, scale_to_width, train_flops_per_token
from hope_megatron.sweep.store import SweepDirectory

Write = Callable[..., Path]
CONFIGS = Path(__file__).parents[3] / "configs" / "sweeps"
LADDER = {"flops_per_token": [2e6, 4e6, 8e6], "depths": [2, 2, 3], "head_size": 16}


def plan(path: Path):
    return make_plan(load_sweep(path))


def test_isoflop_cells_of_all_families_cost_the_same(sweep_file: Write) -> None:
    cells = plan(sweep_file(sizes=LADDER, design={"isoflop_budgets": [1e11, 4e11]})).cells
    assert len(cells) == 2 * 3 * 2
    for budget in (1e11, 4e11):
        assert sum(cell.flops == pytest.approx(budget, rel=0.02) for cell in cells) == 6
    for target in LADDER["flops_per_token"]:
        assert sum(cell.flops_per_token == pytest.approx(target, rel=0.02) for cell in cells) == 4


def test_tokens_and_tokens_per_parameter(sweep_file: Write) -> None:
    widths = {"widths": [32, 64], "head_size": 16}
    by_tokens = plan(sweep_file(sizes=widths, design={"tokens": [10_000, 20_000]})).cells
    assert sorted({cell.tokens for cell in by_tokens}) == [9984, 19968]  # whole steps of 256 tokens
    by_ratio = plan(sweep_file(sizes=widths, design={"tokens_per_parameter": [2.0]})).cells
    assert all(cell.tokens / cell.num_parameters == pytest.approx(2.0, rel=0.01) for cell in by_ratio)


def test_axes_seeds_and_batch_keep_the_tokens(sweep_file: Write) -> None:
    axes = {"optim.lr": [1e-3, 1e-2], "training.global_batch_size": [4, 8]}
    cells = plan(sweep_file(design={"tokens": [20_480]}, axes=axes, seeds=[1, 2])).cells
    assert len(cells) == 2 * 2 * 2 * 2 and len({cell.name for cell in cells}) == len(cells)
    assert {cell.tokens for cell in cells} == {20_480}
    assert {cell.config.training.steps for cell in cells} == {80, 40}
    assert {(cell.config.training.seed, cell.config.data.seed) for cell in cells} == {(1, 1), (2, 2)}


def test_schedule_fractions_follow_each_cell(sweep_file: Write) -> None:
    changes = {"design": {"tokens": [25_600, 51_200]}, "warmup_fraction": 0.1, "decay_fraction": 0.2}
    for cell in plan(sweep_file(**changes)).cells:
        steps = cell.config.training.steps
        assert (cell.config.optim.warmup_steps, cell.config.optim.decay_steps) == (steps // 10, steps // 5)


def test_transfer_keeps_the_rate_and_sets_the_base_width(sweep_file: Write) -> None:
    changes = {"sizes": {"widths": [64, 128], "head_size": 32}, "transfer": {"base_width": 64}}
    cells = plan(sweep_file(**changes)).cells
    assert {cell.config.optim.lr for cell in cells} == {1e-2}
    assert {(cell.config.model.hidden_size, cell.config.model.width_multiplier) for cell in cells} == {
        (64, 1),
        (128, 2),
    }


def test_transfer_refuses_what_it_has_no_rule_for(sweep_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"no learning-rate rule for optim\.name=sgd"):
        plan(sweep_file(transfer={"base_width": 64}, axes={"optim.name": ["sgd"]}))


def test_wrong_axis_key_names_the_nearest(sweep_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lrr.*did you mean optim\.lr\?"):
        plan(sweep_file(axes={"optim.lrr": [1e-3]}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"design": {"tokens": [1000]}}, "fewer than 10"),
        ({"sizes": {"widths": [50]}}, "not a multiple of 64"),
        ({"sizes": {"flops_per_token": [1e3]}}, "comes within"),
        ({"design": {"tokens": [10_000, 10_001]}}, "names two cells"),
    ],
)
def test_what_cannot_be_planned(sweep_file: Write, changes: dict, words: str) -> None:
    with pytest.raises(SweepError, match=words):
        plan(sweep_file(**changes))


def test_budget_refuses_with_the_numbers(sweep_file: Write) -> None:
    check_budget(plan(sweep_file(budget={"device_hours": 100.0})))
    with pytest.raises(SweepError, match=r"the cells need about .* device hours, the budget is 1e-05"):
        check_budget(plan(sweep_file(budget={"device_hours": 1e-5})))
    hardware = {"name": "h100", "usd_per_device_hour": 2.0}
    too_large = {"hardware": hardware, "families": {"hope": {"model": "hope_7b"}}, "budget": {"usd": 1e-6}}
    with pytest.raises(SweepError, match=r"(?s)does not fit.*GB per device.*US dollars"):
        check_budget(plan(sweep_file(**too_large)))


def test_scaling_keeps_proportions() -> None:
    model = load_model_config("hope_tiny")
    scaled = scale_to_width(model, 2 * model.hidden_size)
    assert (scaled.num_layers, scaled.head_dim) == (2 * model.num_layers, model.head_dim)
    assert [level.hidden_size for level in scaled.cms.levels] == [2 * level.hidden_size for level in model.cms.levels]
    grouped = load_model_config("transformer_pp_tiny", ["attention.num_kv_heads=2"])
    assert scale_to_width(grouped, 2 * grouped.hidden_size).attention.num_kv_heads == 4


@pytest.mark.parametrize("target", [3e6, 2e7, 1e9])
def test_size_by_flops_meets_the_target(target: float) -> None:
    for name in ("hope_tiny", "transformer_pp_tiny"):
        model = scale_to_flops(load_model_config(name), target, 256, head_size=16)
        assert train_flops_per_token(model, 256) == pytest.approx(target, rel=0.02)


def test_run_files_load_and_a_started_cell_cannot_change(sweep_file: Write) -> None:
    first = plan(sweep_file(design={"tokens": [20_480]}))
    directory = SweepDirectory(first.sweep.directory)
    directory.prepare(first)
    for cell in first.cells:
        assert load_run_config(directory.run_file(cell)) == cell.config
    (directory.runs / first.cells[0].name).mkdir(parents=True)
    changed = plan(sweep_file(design={"tokens": [20_480]}, warmup_fraction=0.5))
    with pytest.raises(SweepError, match="optim differ"):
        directory.prepare(changed)
    more = plan(sweep_file(design={"tokens": [20_480, 40_960]}))
    directory.prepare(more)
    assert len(list(directory.cells.glob("*.yaml"))) == 4


@pytest.mark.parametrize(("hardware", "gpus", "said"), [({}, 0, True), ({}, 1, False), ({"name": "h100"}, 0, False)])
def test_a_sweep_for_no_hardware_is_priced_on_this_machine_too(sweep_file, monkeypatch, capsys, hardware, gpus, said):
    """Before, a sweep on a CPU was "0 s" of an H100."""
    monkeypatch.setattr("hope_megatron.runtime.process.count_gpus", lambda: gpus)
    assert main(["sweep", "plan", str(sweep_file(hardware=hardware))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " 0s " not in text and "<1s" in text
    assert ("this machine has no GPU. On its CPU" in text) == ("hardware: {name: cpu}" in text) == said


def test_plan_and_status_as_json(sweep_file, capsys):
    file = str(sweep_file())
    cells = {cell.name: cell for cell in plan(file).cells}
    assert main(["sweep", "plan", file, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {row["cell"]: row["flops"] for row in planned["cells"]} == {name: cell.flops for name, cell in cells.items()}
    assert planned["device_hours"] == sum(row["device_hours"] for row in planned["cells"])
    assert main(["sweep", "status", file, "--json"]) == 0
    standing = json.loads(capsys.readouterr().out)
    assert [row["cell"] for row in standing] == list(cells) and {row["state"] for row in standing} == {"waiting"}


def test_only_sizes_around_the_optimum(sweep_file: Write) -> None:
    budgets = {"isoflop_budgets": [1e11, 4e11]}
    low, high = 0.05, 0.4
    cells = plan(sweep_file(sizes=LADDER, design={**budgets, "between_tokens_per_parameter": [low, high]})).cells
    whole = plan(sweep_file(sizes=LADDER, design=budgets)).cells
    assert 0 < len(cells) < len(whole)
    assert {cell.name for cell in cells} == {
        cell.name for cell in whole if low < cell.tokens / cell.num_parameters < high
    }
    with pytest.raises(ConfigError, match="goes with isoflop_budgets"):
        load_sweep(sweep_file(design={"tokens": [10_000], "between_tokens_per_parameter": [1, 2]}))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_sweeps_that_come_with_the_package_can_be_planned(path: Path) -> None:
    plan = make_plan(load_sweep(path))
    assert {cell.family for cell in plan.cells} == {*plan.sweep.families}
    assert len({cell.name for cell in plan.cells}) == len(plan.cells) > 8
