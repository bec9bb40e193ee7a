"""Results of finished cells in a file: another machine takes them as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.cli.main import main
from hope_megatron.runtime.files import write_json, write_text
from hope_megatron.runtime.records import seal
from hope_megatron.sweep.collect import collect
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Plan, make_plan
from hope_megatron.sweep.results import Results
from hope_megatron.sweep.schema import load_sweep
from hope_megatron.sweep.store import State, SweepDirectory

KINDS = {"heldout/loss_new": 6.5, "heldout/loss_pair": 4.5, "heldout/loss_run": 1.5}
Machine = Callable[..., tuple[Plan, SweepDirectory]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("data")
    for i in range(30):
        (home / f"{i}.txt").write_text(" ".join(f"word{i}{j}" for j in range(80)))
    texts = sorted(home.glob("*.txt"))
    tokenizer = train_tokenizer((text.read_text() for text in texts), home / "tokenizer.model", 280)
    prepare(list(map(str, texts)), tokenizer, home / "data", held_out_fraction=0.2)
    return home


@pytest.fixture
def machine(tmp_path: Path, sweep_file: Callable[..., Path], data: Path) -> Machine:
    """A sweep of four cells in a directory of its own."""

    def make(name: str, **changes: object) -> tuple[Plan, SweepDirectory]:
        path = sweep_file()
        sweep = yaml.safe_load(path.read_text())
        sweep["base"]["data"] = {"train": str(data / "data/train"), "heldout": str(data / "data/heldout")}
        sweep["base"]["data"]["tokenizer"] = str(data / "tokenizer.model")
        sweep |= {"output_dir": str(tmp_path / name), "design": {"tokens": [10_240, 20_480]}, **changes}
        path.write_text(yaml.safe_dump(sweep))
        plan = make_plan(load_sweep(path))
        directory = SweepDirectory(plan.sweep.directory)
        directory.prepare(plan)
        return plan, directory

    return make


def finish(plan: Plan, directory: SweepDirectory, number: int) -> None:
    """What a training leaves behind."""
    cell = plan.cells[number]
    run, steps = directory.runs / cell.name, cell.config.training.steps
    run.mkdir(parents=True)
    records = [seal({"step": step, "train/loss": 6 - step / steps}) for step in range(1, steps + 1)]
    write_text(
        run / "metrics.jsonl", "\n".join([*records, seal({"step": steps, "heldout/loss": 5.25, **KINDS})]) + "\n"
    )
    write_json(run / "summary.json", {"complete": True, "step": steps, "wall_s": 3.5, "provenance": {"commit": "abc"}})


def test_another_machine_takes_what_is_finished_and_adds_its_own(tmp_path: Path, machine: Machine) -> None:
    file = tmp_path / "results.json"
    first, there = machine("first")
    finish(first, there, 0)
    assert Results(file, first, there).gather() == 1

    second, here = machine("second")
    results = Results(file, second, here)
    assert results.place() == 1 and results.place() == 0
    assert [here.state(cell) for cell in second.cells] == [State.FINISHED] + [State.WAITING] * 3
    finish(second, here, 1)
    assert results.gather() == 2
    assert json.loads(file.read_text())["cells"][first.cells[0].name]["run"]["provenance"] == {"commit": "abc"}

    third, elsewhere = machine("third")
    Results(file, third, elsewhere).place()
    runs = collect(third, elsewhere, lambda path: 1000)
    assert [(run.name, run.loss) for run in runs] == [(cell.name, 5.25) for cell in first.cells[:2]]
    assert runs[0].kinds == KINDS
    assert runs[0].curve is not None and len(runs[0].curve.loss) <= 60


def test_families_may_be_added_but_nothing_changed(tmp_path: Path, machine: Machine) -> None:
    file = tmp_path / "results.json"
    plan, directory = machine("first")
    finish(plan, directory, 0)
    Results(file, plan, directory).gather()
    families = dict(plan.sweep.families)

    more, directory = machine(
        "more", families={**families, "hope_w1": {"model": "hope_w1_tiny", "model.vocab_size": 512}}
    )
    Results(file, more, directory).gather()
    fewer, directory = machine("fewer")
    Results(file, fewer, directory).gather()
    assert set(json.loads(file.read_text())["sweep"]["families"]) == {*families, "hope_w1"}

    with pytest.raises(SweepError, match=r"another sweep \(warmup_fraction\)"):
        Results(file, *machine("warmup", warmup_fraction=0.5))
    with pytest.raises(SweepError, match=r"another sweep \(families\)"):
        Results(
            file, *machine("family", families={**families, "hope": {"model": "hope_tiny", "model.vocab_size": 1024}})
        )
    good = file.read_text()
    file.write_text(good.replace('"train_tokens": ', '"train_tokens": 1'))
    with pytest.raises(SweepError, match=r"another data \(train_tokens\)"):
        Results(file, *machine("data"))
    file.write_text(good)
    whole = json.loads(file.read_text())
    del whole["cells"][plan.cells[0].name]["curve"]
    file.write_text(json.dumps(whole))
    with pytest.raises(SweepError, match=r"is damaged \('curve'\)"):
        Results(file, *machine("damaged")).place()
    for damaged in ("[]", '{"format": "hope-sweep-results-v1", "cells": {}}', "{"):
        file.write_text(damaged)
        with pytest.raises(SweepError, match="holds no results"):
            Results(file, *machine("none"))


def test_two_machines_at_a_time_lose_nothing(tmp_path: Path, machine: Machine) -> None:
    file = tmp_path / "results.json"
    (plan, one), (_, two) = machine("one"), machine("two")
    first, second = Results(file, plan, one), Results(file, plan, two)
    finish(plan, one, 0)
    finish(plan, two, 1)
    assert first.gather() == 1 and second.gather() == 2


def test_a_report_needs_neither_runs_nor_data(
    tmp_path: Path, machine: Machine, sweep_file: Callable[..., Path]
) -> None:
    file, (plan, directory) = tmp_path / "results.json", machine("first")
    for number in range(len(plan.cells)):
        finish(plan, directory, number)
    Results(file, plan, directory).gather()
    elsewhere = sweep_file(output_dir=str(tmp_path / "elsewhere"), design={"tokens": [10_240, 20_480]})
    assert main(["sweep", "report", str(elsewhere), "--results", str(file), "--bootstrap", "20"]) == 0
    assert "5.25" in (tmp_path / "elsewhere/toy/cells.csv").read_text()
    assert main(["sweep", "run", str(elsewhere), "--results", str(file)]) == 2  # data/train is not there
