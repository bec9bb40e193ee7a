"""`hope sweep fit` on the runs that Besiroglu et al. (arXiv 2404.10102) read off the Chinchilla paper's figure 4.

    python benchmarks/experiments/chinchilla.py svg_extracted_data.csv [--json FILE]

The table is data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla, which states no licence, so that it is
not part of this project. The command says if it is another one, and fails if a coefficient that its authors report lies outside of
the interval found here. They left five runs out by hand; here all 245 are read.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from pathlib import Path

from hope_megatron.sweep.analysis import analyse
from hope_megatron.sweep.collect import Observation
from hope_megatron.sweep.schema import FitConfig
from hope_megatron.testing.benchmark import machine, print_table, write_json

SHA256 = "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30"
REPORTED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def read(path: Path) -> list[Observation]:
    """The runs. Tokens follow from compute, C = 6 N D, as their authors take them."""
    found = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            n, flops = float(row["Model Size"]), float(row["Training FLOP"])
            tokens = flops / 6 / n
            name = f"line {number}"
            found.append(
                Observation(name=name, family="runs", parameters=n, tokens=tokens, flops=flops, loss=float(row["loss"]))
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--json")
    args = parser.parse_args()
    if (digest := hashlib.sha256(args.table.read_bytes()).hexdigest()) != SHA256:
        print(f"{args.table} is not the table that the record is of: its SHA-256 is {digest}", file=sys.stderr)
    (family,) = analyse(read(args.table), FitConfig())
    assert family.law is not None
    found = {name: family.law.estimate(lambda law, name=name: getattr(law, name)) for name in REPORTED}
    missed = [name for name, value in REPORTED.items() if not found[name].low <= value <= found[name].high]
    rows = [
        [name, f"{e.value:.4g}", f"{e.low:.4g} to {e.high:.4g}", f"{REPORTED[name]:.4g}"] for name, e in found.items()
    ]
    print_table(["coefficient", "here", "90 % interval", "reported"], rows)
    print(f"named as outliers: {', '.join(outlier.name for outlier in family.outliers)}")
    if missed:
        print(f"reported values outside of the intervals: {', '.join(missed)}")
    intervals = {name: {**vars(estimate), "reported": REPORTED[name]} for name, estimate in found.items()}
    write_json(args.json, {"machine": machine(), "table": digest, "coefficients": intervals})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
