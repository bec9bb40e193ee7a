"""How fast does text become token shards, beside Hugging Face's `tokenizers` and Dolma's tokenizer on the same text?

    python benchmarks/costs/tokenizing.py --json tokenizing.json
    python benchmarks/costs/tokenizing.py --dolma ENV/bin/dolma        also Dolma's, from an environment of its own

The text is the Python standard library, one document per module, as JSON lines in several files. All read the same files with
the same tokenizer.json on the same number of cores and write ids to disk. What each does beside: `hope data prepare` removes
duplicates, splits off held-out documents, writes shards with an index and digests; `tokenizers` writes bare ids.

Times are wall time and CPU seconds of the process and its children; the second hardly depends on what else runs.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.corpus import document_text, python_stdlib_documents
from hope_megatron.testing.benchmark import machine, print_table, spread, write_json

UNITS = ("mb_per_s", "mb_per_cpu_s")

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


def measured(command: list[str], workers: int) -> tuple[float, float]:
    """(wall, CPU) seconds of a command and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(
    directory: Path, files: list[Path], workers: int, dolma: str | None
) -> dict[str, Callable[[int], list[str]]]:
    """What is measured: number of the repetition -> command."""
    names, tokenizer = [str(path) for path in files], str(directory / "tokenizer.json")

    def python(code: str, model: str, name: str) -> Callable[[int], list[str]]:
        return lambda i: [sys.executable, "-c", code, model, str(directory / f"{name}-{i}"), str(workers), *names]

    found = {
        "hope data prepare, tokenizer.json": python(PREPARE, tokenizer, "ours"),
        "hope data prepare, SentencePiece": python(PREPARE, str(directory / "tokenizer.model"), "pieces"),
        "tokenizers.encode_batch": python(BARE, tokenizer, "bare"),
    }
    if dolma:
        found["dolma tokens"] = lambda i: [
            dolma, "tokens", "--documents", *names, "--destination", str(directory / f"dolma-{i}"), "--processes", str(workers),
            "--tokenizer.name_or_path", tokenizer, "--tokenizer.eos_token_id", "0", "--tokenizer.pad_token_id", "0",
            "--dtype", "uint16",
        ]  # fmt: skip
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
        [name, *(f"{row[unit]['median']:.2f} ({row[unit]['min']:.2f} to {row[unit]['max']:.2f})" for unit in UNITS)]
        for name, row in result["rows"].items()
    ]
    print_table(["", "MB/s", "MB per CPU second"], rows)
    print(f"{result['megabytes']:.1f} MB, {result['tokens_of_tokenizer_json']:,} tokens of tokenizer.json")
    write_json(args.json, result)


def measure(directory: Path, files: list[Path], megabytes: float, args: argparse.Namespace) -> dict[str, Any]:
    """MB/s and tokens/s of each, in turns."""
    from data_pipeline.tokenizer import train_tokenizer

    texts = [json.loads(line)["text"] for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    train_bpe(texts[::4], directory / "tokenizer.json")
    train_tokenizer(texts[::4], directory / "tokenizer.model", 8000, max_bytes=4 << 20)
    times: dict[str, list[tuple[float, float]]] = {}
    for i in range(args.repeats):  # in turns, so that all see the same machine
        for name, command in commands(directory, files, args.workers, args.dolma).items():
            times.setdefault(name, []).append(measured(command(i), args.workers))
    num_tokens = (directory / "bare-0").stat().st_size // np.dtype(np.uint16).itemsize
    rows = {
        name: {
            UNITS[0]: spread([megabytes / wall for wall, _ in pairs]),
            UNITS[1]: spread([megabytes / cpu for _, cpu in pairs]),
        }
        for name, pairs in times.items()
    }
    where = {"machine": machine(), "cores": args.workers, "tokenizers": version("tokenizers")}
    return {"megabytes": megabytes, "tokens_of_tokenizer_json": num_tokens, **where, "rows": rows}


if __name__ == "__main__":
    main()
