"""Many random faults on one run: does it end in the bits of the undisturbed run, without a person?

    make soak FAULTS=200 SEED=1            or: python tools/soak.py --faults 200 --seed 1 --out runs/soak.json
    python tools/soak.py --orders kill@1:12,stop@1:20    these faults instead

One real run on 2 to 4 ranks under its own supervisor (`hope train --nproc N`) meets faults of every kind that
hope_megatron/testing/faults.py knows to survive, at seeded kinds, ranks, steps and phases. What a batch system does (start the
job again after a lost node or a SIGTERM) is done here and counted apart; what a person would have to do fails the soak.

Exit code 0: same bits, no human action. Prints the ledger of the run, and per kind how long it took until the fault was
detected and until a step beyond it was done (median, worst).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hope_megatron.runtime.records import read_records
from hope_megatron.testing.drill import Drill, final_state
from hope_megatron.testing.faults import parse_faults
from launch.attempts import Attempt, History, last_record

WEIGHTS = {
    "kill": 6, "segv": 2, "stop": 2, "hang": 2, "gil": 2, "collective": 2, "io": 2, "network": 2, "nan": 3, "inf": 2,
    "disk": 2, "damage": 3, "litter": 2, "save": 3, "start": 3, "slow": 1, "node": 1, "term": 1,
}  # fmt: skip
PASSING = ("nan", "inf", "huge", "disk", "slow")
"""Kinds that end no attempt."""
STEP_PHASES = ("before-step", "data", "forward", "backward", "agree", "step", "after-step")
START_PHASES = ("data", "imports", "rendezvous", "model", "checkpoint", "first_step")
LAYOUTS = ((2, 2, 1), (2, 1, 2), (3, 1, 1), (4, 2, 1))
"""(ranks, tensor parallel, ZeRO stage); the global batch of 4 fits 2 and 4 data-parallel ranks, not 3."""
_MAX_STARTS = 3
"""Starts that a lost node needs until its last processes have let go of the run directory."""


@dataclass
class Injected:
    """A fault that came."""

    fault: str
    time: float
    detected_s: float | None = None
    recovered_s: float | None = None

    @property
    def kind(self) -> str:
        kind, _, place = self.fault.partition("@")
        if kind == "kill" and place.endswith(":save"):
            return "save"
        return "start" if kind == "kill" and place.rpartition(":")[2] in START_PHASES[1:] else kind

    @property
    def step(self) -> int:
        return int(self.fault.split(":")[1])


def plan(faults: int, seed: int, ranks: int, every: int) -> tuple[str, int]:
    """HOPE_FAULTS for so many faults, and how many steps the run needs for them."""
    rng, step, orders = random.Random(seed), 2, []
    kinds = list(WEIGHTS)
    while len(orders) < faults:
        kind = rng.choices(kinds, list(WEIGHTS.values()))[0]
        rank = rng.randrange(ranks)
        step += rng.randrange(1, every)
        if kind in ("nan", "inf", "huge", "disk", "slow", "damage", "litter"):
            orders.append(f"{kind}@{rank}:{step}")
        elif kind == "save":
            step += -step % every  # a step that saves
            orders.append(f"kill@{rank}:{step}:save")
        elif kind == "start":
            orders.append(f"kill@{rng.randrange(ranks)}:{step}")
            if len(orders) < faults:  # and its successor while it starts
                phase = rng.choice(START_PHASES[1:])
                orders.append(f"kill@{rank}:{max(step - every, 0) // every * every}:{phase}")
        else:
            orders.append(f"{kind}@{rank}:{step}:{rng.choice(STEP_PHASES)}")
    return ",".join(orders), step + 5


class Soak:
    """One soak, in a directory."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        rng = random.Random(args.seed)
        self.ranks, tp, zero_stage = args.layout or rng.choice([layout for layout in LAYOUTS if layout[0] != 3])
        self.orders, steps = plan(args.faults, args.seed, self.ranks, args.every)
        if args.orders:
            self.orders, steps = args.orders, max(fault.step for fault in parse_faults(args.orders)) + 5
        layout = {"ranks": self.ranks, "tp": tp, "zero_stage": zero_stage}
        self.drill = Drill(work, **layout, steps=steps, every=args.every, hang_s=args.hang_s)
        self.steps, self.layout = steps, layout
        self.run_dir, self.log = self.drill.run_dir("soak"), work / "soak.log"
        self.injected: dict[str, Injected] = {}
        self.human: list[str] = []
        self.requeues = 0

    def run(self) -> dict[str, Any]:
        """The report."""
        self.drill.prepare()
        began = time.monotonic()
        code, output = self.drill.run("reference", timeout_s=7200)
        if code:
            raise SystemExit(f"the undisturbed run failed:\n{output[-3000:]}")
        reference_s, began = time.monotonic() - began, time.monotonic()
        self._disturb()
        expected = final_state(self.drill.run_dir("reference"))
        found = final_state(self.run_dir)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        self._measure_detection()
        ordered = parse_faults(self.orders)
        return {
            "faults": len(self.injected),
            "ordered": len(ordered),
            "missing": [str(fault) for number, fault in enumerate(ordered) if f"{number:04d}" not in self.injected],
            "layout": self.layout,
            "steps": self.steps,
            "equal": not different,
            "different": different,
            "human_actions": self.human,
            "requeues": self.requeues,
            "attempts": len(self._attempts()),
            "reference_s": round(reference_s, 1),
            "disturbed_s": round(time.monotonic() - began, 1),
            "by_kind": self._by_kind(),
            "ledger": read_records(self.run_dir / "ledger.jsonl").records,
            "each": [vars(item) | {"kind": item.kind} for item in self.injected.values()],
        }

    def _disturb(self) -> None:
        """Run until the end, as a batch system would: after a lost node or a SIGTERM the job starts again."""
        in_vain = 0
        while True:
            process = self.drill.start("soak", self.orders, log=self.log)
            before = len(self.injected)
            while process.poll() is None:
                self._look()
                time.sleep(0.02)
            self._look()
            if process.returncode == 0:
                return
            fresh = [item.kind for item in list(self.injected.values())[before:]]
            in_use = "is in use by" in self.log.read_text().splitlines()[-1]
            in_vain = in_vain + 1 if in_use else 0
            if (process.returncode in (-9, 143) and {"node", "term"} & {*fresh}) or (in_use and in_vain <= _MAX_STARTS):
                self.requeues += not in_use
                time.sleep(1.0 if in_use else 0.0)
                continue
            tail = self.log.read_text().splitlines()[-4:]
            self.human.append(f"exit code {process.returncode} after {fresh[-1:]}: " + " | ".join(tail))
            raise SystemExit("a person would be needed: " + json.dumps(self.human, indent=1))

    def _look(self) -> None:
        """Note which faults have come, and which the run has left behind."""
        ordered = parse_faults(self.orders)
        for path in sorted((self.run_dir / "launch" / "faults").glob("*")):
            if path.name not in self.injected:
                self.injected[path.name] = Injected(str(ordered[int(path.name)]), path.stat().st_mtime)
        waiting = [item for item in self.injected.values() if item.recovered_s is None]
        if waiting:
            record = last_record(self.run_dir)
            beyond = [item for item in waiting if record.get("step", 0) >= item.step]
            began = max((attempt.started for attempt in self._attempts()), default=0.0) if beyond else 0.0
            for item in beyond:
                # A rank that stood still is woken for its stack, and may make a step before it is ended.
                since = item.time if item.kind in PASSING else max(item.time, began if began > item.time else math.inf)
                if record.get("time/unix_s", 0) > since:
                    item.recovered_s = round(record["time/unix_s"] - item.time, 2)

    def _attempts(self) -> list[Attempt]:
        return History(self.run_dir / "launch" / "attempts.jsonl").attempts

    def _measure_detection(self) -> None:
        """A fault that ended an attempt was detected when the supervisor saw that end."""
        ends = sorted(a.detected or a.ended or 0.0 for a in self._attempts())
        for item in self.injected.values():
            after = next((end for end in ends if end >= item.time), None)
            if item.kind not in PASSING and after is not None and after - item.time < (item.recovered_s or 1e9):
                item.detected_s = round(after - item.time, 2)

    def _by_kind(self) -> dict[str, Any]:
        report = {}
        for kind, count in sorted(Counter(item.kind for item in self.injected.values()).items()):
            items = [item for item in self.injected.values() if item.kind == kind]
            detected = [item.detected_s for item in items if item.detected_s is not None]
            recovered = [item.recovered_s for item in items if item.recovered_s is not None]
            report[kind] = {"count": count, "detect_s": spread(detected), "recover_s": spread(recovered)}
        return report


def spread(values: list[float]) -> dict[str, float] | None:
    """Median and worst."""
    return {"median": round(statistics.median(values), 2), "worst": max(values)} if values else None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--orders", metavar="FAULTS", help="these instead of random ones, as in HOPE_FAULTS: kill@1:12,stop@1:20"
    )
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--hang-s", type=float, default=4.0, help="limit of a phase of a step (default: %(default)s)")
    parser.add_argument("--layout", type=int, nargs=3, metavar=("RANKS", "TP", "ZERO"), help="default: by the seed")
    parser.add_argument("--work", type=Path, help="directory to keep; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="hope-soak-"))
    shutil.rmtree(work / "runs", ignore_errors=True)
    try:
        report = Soak(args, work).run()
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "each"}, indent=1))
    worst = max((item["recovered_s"] or 0.0) for item in report["each"]) if report["each"] else 0.0
    verdict = "same bits" if report["equal"] else f"OTHER BITS in {', '.join(report['different'])}"
    print(f"{report['faults']} faults of {report['ordered']}: {verdict}; human actions 0; worst recovery {worst:.1f} s")
    if report["missing"]:
        print(f"never came: {', '.join(report['missing'])}")
    return 0 if report["equal"] and not report["missing"] else 1


if __name__ == "__main__":
    sys.exit(main())
