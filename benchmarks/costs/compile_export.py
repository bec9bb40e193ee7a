"""How long does torch.compile take from cold on an exported model: its first forward, and the first step of transformers' Trainer?

    hope export hf RUN DIR
    python benchmarks/costs/compile_export.py DIR              three processes each, with an empty cache of kernels every time
    python benchmarks/costs/compile_export.py DIR --warm       and one more that finds the kernels of the last

Wall seconds with Inductor on a CPU, of the first forward or step alone, beside the same without torch.compile; losses of both are
compared. DIR is an export of yours: its own modelling code is run (trust_remote_code).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, write_json

ROWS, TOKENS = 8, 128
KINDS = ("forward", "step")


def measure(directory: str, kind: str, compiled: bool) -> dict[str, float]:
    """In a process of its own: seconds of the first forward or training step, the loss, and kernels that were made."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).float()
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(4, vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    begin = time.monotonic()
    if kind == "forward":
        with torch.no_grad():
            loss = float((torch.compile(model.eval()) if compiled else model.eval())(ids, labels=ids).loss)
    else:
        arguments = transformers.TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, torch_compile=compiled,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        loss = transformers.Trainer(model, arguments, train_dataset=rows).train().training_loss
    return {"seconds": time.monotonic() - begin, "loss": loss}


def run(directory: str, kind: str, compiled: bool, cache: str) -> dict[str, Any]:
    """`measure` in a new process with this cache of kernels."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    command = [sys.executable, __file__, directory, "--measure", kind, *(["--compiled"] if compiled else [])]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, "kernels": len(list(Path(cache).rglob("*.so")))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="one more with the kernels of the last")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.directory, options.measure, options.compiled)))
        return
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as cache:
            plain = run(options.directory, kind, False, cache)
        rows.append({"what": kind, "compiled": "no", **plain})
        for number in range(options.repeats):
            with tempfile.TemporaryDirectory() as cache:
                rows.append({"what": kind, "compiled": "cold", **run(options.directory, kind, True, cache)})
                if options.warm and number == options.repeats - 1:
                    rows.append({"what": kind, "compiled": "warm", **run(options.directory, kind, True, cache)})
        worst = max(abs(row["loss"] - plain["loss"]) for row in rows if row["what"] == kind)
        print(f"{kind}: losses differ by {worst:.1e} at most, load {os.getloadavg()[0]:.1f}", flush=True)
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
