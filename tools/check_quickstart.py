"""Check what `make quickstart` promises: python tools/check_quickstart.py runs/quickstart/report.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NATS_BELOW_UNIGRAM = 1.5
EXPORT_LOGIT_TOLERANCE = 1e-3
REQUIRED = (
    "parameters",
    "world_size",
    "tp",
    "sequence_parallel",
    "zero_stage",
    "optimizer",
    "tokens_seen",
    "tokens_per_second",
    "heldout_loss",
    "unigram_loss",
    "bigram_loss",
    "newton_schulz_calls",
    "export_logit_difference",
    "seconds",
)


def broken_promises(report: dict) -> list[str]:
    """What the report does not show, one line each."""
    missing = [f"{key} is missing" for key in REQUIRED if report.get(key) is None]
    if missing:
        return missing
    loss, unigram, bigram = report["heldout_loss"], report["unigram_loss"], report["bigram_loss"]
    promises = {
        f"held-out loss {loss:.3f} is at least {NATS_BELOW_UNIGRAM} below unigram {unigram:.3f}": loss
        <= unigram - NATS_BELOW_UNIGRAM,
        f"held-out loss {loss:.3f} is below bigram {bigram:.3f}": loss < bigram,
        f"exported logits differ by {report['export_logit_difference']:g}, at most {EXPORT_LOGIT_TOLERANCE:g}": report[
            "export_logit_difference"
        ]
        <= EXPORT_LOGIT_TOLERANCE,
        "training ran in several processes": report["world_size"] > 1,
        "M3 orthogonalised matrices": report["newton_schulz_calls"] > 0,
    }
    return [f"not so: {promise}" for promise, kept in promises.items() if not kept]


def main(path: str) -> int:
    """Print what is broken; exit code 1 if anything is."""
    broken = broken_promises(json.loads(Path(path).read_text(encoding="utf-8")))
    for line in broken:
        print(f"{path}: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
