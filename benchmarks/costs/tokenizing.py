"""How fast does text become token shards, beside Hugging Face's `tokenizers` and Dolma's tokenizer on the same text?

    python benchmarks/costs/tokenizing.py --json tokenizing.json
    python benchmarks/costs/tokenizing.py --dolma ENV/bin/dolma        also Dolma's, from an environment of its own

The text is the Python standard library, one document per module, as JSON lines in several files. All read the same files with
the same tokenizer.json on the same number of cores and write ids to disk. What each does beside: `hope data prepare` removes
duplicates, splits off held-out documents, writes shards with an index and digests; `tokenizers` writes bare ids.

Tokens are those that each wrote. Times are wall time and CPU seconds of the process and its children; the second hardly
depends on what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.corpus import document_text, python_stdlib_documents
from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.prepare import SPLITS
from hope_megatron.testing.benchmark import machine, print_table, spread, write_json

UNITS = {"tokens_per_s": 0, "mb_per_s": 2, "mb_per_cpu_s": 2}  # and digits shown

PREPARE = """
import sys
from data_pipeline.prepare import prepare
tokenizer, out, workers, *files = sys.argv[1:]
prepare(files, tokenizer, out, held_out_fraction=0.01, workers=int(workers))
"""
BARE = """
import json, sys
import numpy as np
import tokenizers
file, out, _, *files = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(file)
with open(out, "wb") as target:
    for path in files:
        texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            np.array(encoding.ids, np.uint16).tofile(target)
"""


def write_text(directory: Path, num_files: int) -> tuple[list[Path], float]:
    """JSON lines in several files, and megabytes of text."""
    texts = [document_text(document) for document in python_stdlib_documents()]
    files = [directory / f"part-{i}.jsonl" for i in range(num_files)]
    for i, path in enumerate(files):
        lines = (
            json.dumps({"id": f"{i}-{n}", "source": "stdlib", "text": t}) for n, t in enumerate(texts[i::num_files])
        )
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files, sum(len(text.encode()) for text in texts) / 1e6


def train_bpe(texts: list[str], path: Path) -> None:
    """A byte-level BPE of 8,000 ids."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(path))


def write_old_layout(path: Path, target: Path) -> None:
    """The same tokenizer.json with each merge as one string "a b": tokenizers before 0.20, which Dolma asks for, reads no pairs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    target.write_text(json.dumps(content), encoding="utf-8")


def tokens_written(path: Path) -> int:
    """Tokens of shards of ours with their manifests, of Dolma's arrays (uint16 without a header), or of bare ids."""
    manifests = [path / split / MANIFEST_NAME for split in SPLITS]
    if all(manifest.is_file() for manifest in manifests):
        return sum(json.loads(manifest.read_text())["tokens"] for manifest in manifests)
    arrays = [path] if path.is_file() else sorted(path.rglob("*.npy"))
    return sum(array.stat().st_size for array in arrays) // np.dtype(np.uint16).itemsize


def measured(command: list[str], workers: int) -> tuple[float, float]:
    """(wall, CPU) seconds of a command and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(
            f"{command[0]} ended with exit code {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass(frozen=True)
class Contender:
    """A name in the table; the command that reads the files and writes to `output` + the number of the repetition."""

    name: str
    output: Path
    command: Callable[[Path], list[str]]


def contenders(directory: Path, files: list[Path], workers: int, dolma: str | None) -> list[Contender]:
    """What is measured."""
    names = [str(path) for path in files]

    def python(name: str, code: str, model: str, out: str) -> Contender:
        model = str(directory / model)
        return Contender(
            name, directory / out, lambda out: [sys.executable, "-c", code, model, str(out), str(workers), *names]
        )

    found = [
        python("hope data prepare, tokenizer.json", PREPARE, "tokenizer.json", "ours"),
        python("hope data prepare, SentencePiece", PREPARE, "tokenizer.model", "pieces"),
        python("tokenizers.encode_batch", BARE, "tokenizer.json", "bare"),
    ]
    if dolma:
        tokenizer = directory / "old_layout.json"
        write_old_layout(directory / "tokenizer.json", tokenizer)
        options = [
            "--tokenizer.name_or_path",
            str(tokenizer),
            "--tokenizer.eos_token_id",
            "0",
            "--tokenizer.pad_token_id",
            "0",
        ]
        found.append(Contender("dolma tokens", directory / "dolma", lambda out: [
            dolma, "tokens", "--documents", *names, "--destination", str(out), "--processes", str(workers), *options,
            "--dtype", "uint16",
        ]))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dolma", metavar="COMMAND", help="the dolma command of another environment")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        files, megabytes = write_text(directory, 4)
        result = measure(directory, files, megabytes, args)
    rows = [
        [
            name,
            *(
                f"{row[unit]['median']:,.{digits}f} ({row[unit]['min']:,.{digits}f} to {row[unit]['max']:,.{digits}f})"
                for unit, digits in UNITS.items()
            ),
        ]
        for name, row in result["rows"].items()
    ]
    print_table(["", "tokens/s", "MB/s", "MB per CPU second"], rows)
    written = ", ".join(f"{name} {row['tokens']:,}" for name, row in result["rows"].items())
    print(f"{result['megabytes']:.1f} MB; tokens written: {written}")
    write_json(args.json, result)


def repetition(one: Contender, i: int) -> Path:
    """Where the i-th repetition writes."""
    return one.output.with_name(f"{one.output.name}-{i}")


def measure(directory: Path, files: list[Path], megabytes: float, args: argparse.Namespace) -> dict[str, Any]:
    """MB/s and tokens/s of each, in turns."""
    from data_pipeline.tokenizer import train_tokenizer

    texts = [json.loads(line)["text"] for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    train_bpe(texts[::4], directory / "tokenizer.json")
    train_tokenizer(texts[::4], directory / "tokenizer.model", 8000, max_bytes=4 << 20)
    found = contenders(directory, files, args.workers, args.dolma)
    times: dict[str, list[tuple[float, float]]] = {}
    for i in range(args.repeats):  # in turns, so that all see the same machine
        for one in found:
            times.setdefault(one.name, []).append(measured(one.command(repetition(one, i)), args.workers))
    rows = {}
    for one in found:
        tokens, pairs = tokens_written(repetition(one, 0)), times[one.name]
        per_second = (
            [tokens / wall for wall, _ in pairs],
            [megabytes / wall for wall, _ in pairs],
            [megabytes / cpu for _, cpu in pairs],
        )
        rows[one.name] = {"tokens": tokens, **{unit: spread(values) for unit, values in zip(UNITS, per_second)}}
    where = {"machine": machine(), "cores": args.workers, "tokenizers": version("tokenizers")}
    return {"megabytes": megabytes, **where, "rows": rows}


if __name__ == "__main__":
    main()
