"""From text to a pretrained HOPE on this machine, in minutes, with the parts that train large ones.

Examples:

    hope quickstart                    the Python standard library's own sources as the corpus
    hope quickstart --text BOOK DIR    any UTF-8 text
    hope quickstart training.steps=50  any setting of configs/runs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hope_megatron.cli.models import prepare_process
from hope_megatron.cli.quickstart_report import build_report, write_report
from hope_megatron.convert.open_model import open_model
from hope_megatron.runtime.process import available_cpus, count_gpus

if TYPE_CHECKING:
    from hope_megatron.config import RunConfig

PYTHON_STDLIB = "python-stdlib"
HELD_OUT_FRACTION = 0.05
MAX_EVAL_TOKENS = 1 << 18
SAMPLE_TOKENS = 120
MIN_DOCUMENTS = 40  # fewer files than this are cut into pieces, so that some can be held out
PIECE_BYTES = 1 << 13


class QuickstartError(Exception):
    """The quickstart cannot go on. What was made so far stays where it is."""

    is_user_error = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the run file, for example training.steps=50"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="files, directories or globs; default: the Python standard library"
    )
    parser.add_argument(
        "--config", default="quickstart", metavar="FILE", help="run file (default: configs/runs/quickstart.yaml)"
    )


def run(args: argparse.Namespace) -> int:
    """Run all phases and write the report."""
    _choose_device()
    prepare_process(num_threads=1)  # inherited by the training processes; evaluation takes all cores later
    from hope_megatron.config import load_run_config

    config = _in_one_directory(load_run_config(args.config, args.overrides))
    from data_pipeline.files import exclusive

    with exclusive(config.output_dir.parent):
        Quickstart(config, args.text or [PYTHON_STDLIB]).run()
    return 0


def _in_one_directory(config: RunConfig) -> RunConfig:
    """The run with its shards, its tokenizer and everything else below output_dir."""
    directory = Path(os.path.abspath(config.output_dir))
    data = directory / "data"
    paths = {"train": data / "train", "heldout": data / "heldout", "tokenizer": data / "tokenizer.model"}
    return config.model_copy(update={"output_dir": directory, "data": config.data.model_copy(update=paths)})


def _choose_device() -> None:
    """Two processes need two GPUs; with one, run on the CPU cores, and say so."""
    if count_gpus() == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        print("one GPU does not fit two processes: the quickstart runs on the CPU cores")


def _make_room(directory: Path) -> None:
    """Start in a directory of our own: an earlier quickstart moves aside whole, nothing is mixed or removed."""
    if not directory.exists():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"the earlier {directory.name} is now {_short(aside)}")


@dataclass
class Quickstart:
    """The road: each phase leaves files for the next, and facts for the report."""

    config: RunConfig
    sources: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    def run(self) -> None:
        """All phases in order."""
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self._run()
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _run(self) -> None:
        started = time.monotonic()
        with self._phase(1, "corpus"):
            self._corpus()
        _make_room(self.directory)
        with self._phase(2, "tokenizer"):
            self._tokenizer()
        with self._phase(3, "shards"):
            self._shards()
        with self._phase(4, "pretraining"):
            self._pretrain()
        with self._phase(5, "evaluation"):
            self._evaluate()
        with self._phase(6, "export"):
            self._export()
            self.samples = self._samples()
        self.seconds["total"] = time.monotonic() - started
        with self._phase(7, "report"):
            self._report()

    @contextmanager
    def _phase(self, number: int, name: str) -> Iterator[None]:
        print(f"\n[{number}/7] {name}", flush=True)
        started = time.monotonic()
        yield
        if self.interrupted:  # an exception that arrives inside a C extension or an import can get lost there
            raise KeyboardInterrupt
        self.seconds[name] = time.monotonic() - started
        print(f"      {self.seconds[name]:.1f} s", flush=True)

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.config.output_dir

    def _corpus(self) -> None:
        from data_pipeline.corpus import ReadOptions, expand_sources

        files = expand_sources(self.sources)
        size = sum(file.size or 0 for file in files)
        cut = len(files) < MIN_DOCUMENTS
        self.read = ReadOptions(text_unit="chunk", chunk_bytes=PIECE_BYTES) if cut else ReadOptions()
        self.facts |= {"corpus": self.sources, "corpus_files": len(files), "corpus_bytes": size}
        _say(f"{len(files):,} files, {size / 1e6:.1f} MB: {', '.join(self.sources)}")

    def _tokenizer(self) -> None:
        from data_pipeline.corpus import iterate_texts
        from data_pipeline.tokenizer import train_tokenizer

        path = self.config.data.tokenizer
        self.tokenizer = train_tokenizer(iterate_texts(self.sources, self.read), path, self.config.model.vocab_size)
        _say(f"SentencePiece BPE with byte fallback, {self.tokenizer.vocab_size:,} ids: {_short(path)}")

    def _shards(self) -> None:
        from data_pipeline.prepare import prepare
        from data_pipeline.report import describe_names

        report = prepare(
            self.sources, self.tokenizer, self.directory / "data", held_out_fraction=HELD_OUT_FRACTION, read=self.read
        )
        self.facts |= {"documents": report.documents, "corpus_tokens": report.tokens}
        for split, documents in report.documents.items():
            _say(f"{split}: {documents:,} documents, {report.tokens[split]:,} tokens")
        for reason, entry in report.left_out.items():
            _say(f"left out: {entry['files']:,} files, {reason}: {describe_names(entry)}")
        if report.documents_rejected:
            _say("rejected: " + ", ".join(f"{count:,} {reason}" for reason, count in report.rejected.items()))

    def _pretrain(self) -> None:
        from hope_megatron.cli.train import PRELOAD
        from hope_megatron.config import dump_config
        from hope_megatron.runtime.files import write_text
        from launch.local import run_supervised

        run_file = self.directory / "run.yaml"
        write_text(run_file, dump_config(self.config))
        parallel, nproc = self.config.parallel, self.config.parallel.tensor_parallel
        sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
        _say(
            f"{nproc} processes, tensor parallel {nproc}{sequence}, ZeRO-{parallel.zero_stage}, "
            f"{self.config.optim.name} on matrices; {self.config.training.tokens:,} tokens"
        )
        exit_code = run_supervised(
            ["train", str(run_file)],
            nproc,
            self.config.run_dir,
            name=self.config.name,
            steps=self.config.training.steps,
            oversubscribe=nproc > available_cpus(),
            preload=PRELOAD,
        )
        if exit_code == 130:
            raise KeyboardInterrupt
        if exit_code:
            log = f"{_short(self.config.run_dir)}/train.log"
            raise QuickstartError(f"pretraining ended with exit code {exit_code}, as told above; its log is {log}")

    def _evaluate(self) -> None:
        import torch

        from hope_megatron.eval.evaluate import evaluate
        from hope_megatron.eval.heldout import manifest_tokens
        from hope_megatron.eval.report import score_table

        torch.set_num_threads(available_cpus())
        opened = open_model(str(self.config.run_dir))
        tokens = manifest_tokens(self.directory / "data/heldout", self.tokenizer, MAX_EVAL_TOKENS)
        result = evaluate(opened, tokens, opened.window_tokens, baseline_manifest=self.config.data.train)
        self.facts["evaluation"] = result
        table = score_table(result["scores"]).splitlines()
        _say(f"{result['tokens']:,} held-out tokens, none of them seen in training", *table)

    def _export(self) -> None:
        from hope_megatron.checkpoint.find import find_checkpoint
        from hope_megatron.convert.huggingface.export import export_huggingface

        source = find_checkpoint(str(self.config.run_dir))
        self.export = export_huggingface(source, self.directory / "model", self.tokenizer)
        _say(f"{_short(self.export.directory)}: {self.export.num_parameters:,} parameters", f"{self.export.check}")

    def _samples(self) -> list[str]:
        """Text drawn from the exported model."""
        import torch

        from hope_megatron.generation.complete import complete
        from hope_megatron.generation.sampling import SamplingOptions

        opened = open_model(str(self.directory / "model"))
        options = SamplingOptions(temperature=0.7, top_p=0.95)
        rng = torch.Generator(next(opened.model.parameters()).device).manual_seed(0)
        prompts = ["def ", "class "] if self.sources == [PYTHON_STDLIB] else [""] * 2
        samples = []
        for prompt in prompts:
            (text,) = complete(
                opened.model, opened.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, options=options, rng=rng
            )
            samples.append(prompt + text)
            _say("-" * 60, *samples[-1].splitlines())
        return samples

    def _report(self) -> None:
        report = build_report(self.config, self.facts, self.seconds, self.export, self.samples)
        write_report(self.directory, self.config, report)
        here = _short(self.directory)
        _say(
            f"held-out loss {report['heldout_loss']:.3f} nats per token; bigram {report['bigram_loss']:.3f}, "
            f"unigram {report['unigram_loss']:.3f}; {self.seconds['total']:.0f} s in all",
            "",
            f"read     {here}/report.md, losses.png, curves.png",
            f"sample   hope generate {here}/model --prompt 'def main('",
            f"measure  hope eval {here}/{self.config.name} --baselines --context stream",
            f"track    mlflow ui --backend-store-uri sqlite:///{here}/mlflow.db",
        )


def _short(path: Path | str) -> str:
    """As a person in this directory would type it."""
    is_below = isinstance(path, Path) and path.is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd()) if is_below else path)


def _say(*lines: str) -> None:
    for line in lines:
        print(f"      {line}")
    sys.stdout.flush()
