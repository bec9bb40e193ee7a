"""The runner, with a program in the place of `hope train` that ends the way each cell's learning rate says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hope_megatron.sweep.collect import collect
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Plan, make_plan
from hope_megatron.sweep.run import LocalRunner
from hope_megatron.sweep.schema import load_sweep
from hope_megatron.sweep.status import goes_on, status_table, sweep_status
from hope_megatron.sweep.store import State, SweepDirectory

PROGRAM = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time, yaml
    config = yaml.safe_load(open(sys.argv[1]))
    run = pathlib.Path(config["output_dir"]) / config["name"]
    run.mkdir(parents=True, exist_ok=True)
    starts = run / "starts"
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    kind, steps = config["optim"]["lr"], config["training"]["steps"]
    if kind == 0.5:
        print("error: the data is missing"); sys.exit(2)
    if kind == 0.25 and len(starts.read_text()) < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 0.125:
        print("the loss is not finite"); sys.exit(1)
    if kind == 0.0625 and len(starts.read_text()) < 2:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        time.sleep(60)
    records = [{"step": s, "train/loss": 5.0 - s / steps} for s in range(1, steps + 1)]
    records[-1]["heldout/loss"] = 4.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + chr(10) for record in records))
    (run / "summary.json").write_text(json.dumps({"complete": True, "step": steps}))
""")


class Sweep:
    """A sweep of one cell per kind of ending."""

    def __init__(self, path: Path, program: Path) -> None:
        self.plan: Plan = make_plan(load_sweep(path))
        self.directory = SweepDirectory(self.plan.sweep.directory)
        self.directory.prepare(self.plan)
        self.program, self.lines = program, []

    def run(self, **options: object) -> int:
        runner = LocalRunner(
            self.plan, self.directory, 2, say=self.lines.append, train=(sys.executable, str(self.program))
        )
        return runner.run(**options)

    def states(self) -> dict[float, State]:
        return {cell.config.optim.lr: self.directory.state(cell) for cell in self.plan.cells}

    def starts(self, lr: float) -> int:
        cell = next(cell for cell in self.plan.cells if cell.config.optim.lr == lr)
        return len((self.directory.runs / cell.name / "starts").read_text())


@pytest.fixture
def sweep(sweep_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Sweep]:
    def make(*kinds: float) -> Sweep:
        (tmp_path / "program.py").write_text(PROGRAM)
        families = {"hope": {"model": "hope_tiny", "model.vocab_size": 512}}
        return Sweep(sweep_file(families=families, axes={"optim.lr": list(kinds)}, retries=1), tmp_path / "program.py")

    return make


def test_finished_cells_are_not_run_again(sweep: Callable[..., Sweep]) -> None:
    made = sweep(1e-2, 1e-3)
    assert made.run() == 0 and set(made.states().values()) == {State.FINISHED}
    assert made.run() == 0 and made.starts(1e-2) == made.starts(1e-3) == 1
    observations = collect(made.plan, made.directory, lambda path: 1000)
    assert [one.loss for one in observations] == [4.25, 4.25] and observations[0].curve is not None
    assert observations[0].unique_tokens == 1000


def test_failures_are_retried_then_set_aside(sweep: Callable[..., Sweep]) -> None:
    made = sweep(1e-2, 0.5, 0.25, 0.125)
    assert goes_on(sweep_status(made.plan, made.directory))  # nothing runs, but cells wait
    assert made.run() == 1
    assert not goes_on(sweep_status(made.plan, made.directory))
    assert made.states() == {1e-2: State.FINISHED, 0.5: State.SET_ASIDE, 0.25: State.FINISHED, 0.125: State.SET_ASIDE}
    assert (made.starts(0.5), made.starts(0.25), made.starts(0.125)) == (1, 2, 2)  # a mistake is not tried again
    reasons = {status.cell.config.optim.lr: status.reason for status in sweep_status(made.plan, made.directory)}
    assert reasons[0.5] == "error: the data is missing" and reasons[0.125] == "the loss is not finite"
    assert any("killed by SIGKILL" in line for line in made.lines)
    assert made.run() == 1 and made.starts(0.125) == 2
    assert made.run(retry=True) == 1 and made.starts(0.125) == 4
    assert status_table(sweep_status(made.plan, made.directory), "toy").row_count == 4


def test_interrupted_cells_go_on(sweep: Callable[..., Sweep]) -> None:
    made = sweep(1e-2, 0.0625)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = made.run()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while len(list(made.directory.runs.glob("*/starts"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert made.states()[0.0625] is State.RUNNING
    started = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and time.monotonic() - started < 30
    assert made.states()[0.0625] is State.INTERRUPTED and goes_on(sweep_status(made.plan, made.directory))
    assert made.run() == 0 and made.starts(0.0625) == 2


def test_a_claim_lasts_as_long_as_the_training_process(sweep: Callable[..., Sweep]) -> None:
    made = sweep(1e-2)
    cell = made.plan.cells[0]
    claim = made.directory.claim(cell)
    assert claim is not None and made.directory.claim(cell) is None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[claim])
    os.close(claim)  # as when the runner is killed
    assert made.directory.state(cell) is State.RUNNING
    assert made.run() == 0 and made.states() == {1e-2: State.RUNNING}  # someone else's cell is left alone
    child.kill()
    child.wait()
    assert made.run() == 0 and made.states() == {1e-2: State.FINISHED}


def test_nothing_to_collect_is_said(sweep: Callable[..., Sweep]) -> None:
    made = sweep(1e-2)
    with pytest.raises(SweepError, match="no cell of toy has finished"):
        collect(made.plan, made.directory, lambda path: 1)
    assert made.run() == 0
    metrics = next(made.directory.runs.glob("*/metrics.jsonl"))
    metrics.write_text("".join(json.dumps({"step": s, "train/loss": 3.0}) + "\n" for s in range(1, 21)))
    with pytest.raises(SweepError, match="has no heldout/loss"):
        collect(made.plan, made.directory, lambda path: 1)
