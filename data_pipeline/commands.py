"""What the commands of `hope data` do. Results go to standard output, progress and remarks to standard error."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from data_pipeline import inspection
from data_pipeline.corpus import ReadOptions, iterate_texts
from data_pipeline.display import Progress
from data_pipeline.errors import ManifestError, SourceError, TokenizerError
from data_pipeline.files import check_writable, print_whole, write_json
from data_pipeline.filters import Filters
from data_pipeline.history import DataHistory
from data_pipeline.import_indexed import import_indexed
from data_pipeline.indexed import IndexedFile
from data_pipeline.manifest import Manifest
from data_pipeline.merge import merge
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare import prepare
from data_pipeline.report import PrepareReport
from data_pipeline.samples import NO_TOKEN
from data_pipeline.tokenizer import train_tokenizer


def _print(arguments: argparse.Namespace, value: Any, text: str) -> None:
    print_whole((json.dumps(value, indent=1) if arguments.json else text) + "\n")


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(arguments.text_field, arguments.text_unit, arguments.chunk_bytes, arguments.max_document_bytes)


def run_tokenizer(arguments: argparse.Namespace) -> int:
    if arguments.existing:
        tokenizer = load_tokenizer(arguments.existing)
        tokenizer.save(arguments.out)
    elif arguments.sources:
        check_writable(Path(arguments.out).parent)
        with Progress("training the tokenizer"):
            tokenizer = train_tokenizer(
                iterate_texts(arguments.sources, _read_options(arguments), follow_links=arguments.follow_links),
                arguments.out,
                arguments.vocab_size,
                arguments.model_type,
                max_bytes=arguments.max_bytes,
                seed=arguments.seed,
            )
    else:
        raise SourceError("name sources of text to train on (e.g. python-stdlib), or a model with --existing.")
    value = {
        "path": str(arguments.out),
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.digest,
        "special_ids": tokenizer.special_ids,
        "exact_round_trip": tokenizer.is_exact,
    }
    remark = "" if tokenizer.is_exact else "\nIt normalises text, so decoding does not give every text back exactly."
    _print(arguments, value, f"{arguments.out}: {tokenizer.vocab_size} token ids, SHA-256 {tokenizer.digest}{remark}")
    return 0


def run_prepare(arguments: argparse.Namespace) -> int:
    with Progress("preparing") as display:
        report = prepare(
            arguments.sources,
            arguments.tokenizer,
            **_output_options(arguments, display),
            read=_read_options(arguments),
            filters=Filters(
                arguments.min_chars, arguments.max_chars, arguments.max_repeated_lines, arguments.min_letters
            ),
            deduplicate=not arguments.keep_duplicates,
            near_duplicates=arguments.near_duplicates,
            slice=arguments.slice,
            follow_links=arguments.follow_links,
        )
    _print(arguments, dataclasses.asdict(report), report.describe(arguments.text_field))
    return 0


def _output_options(arguments: argparse.Namespace, display: Progress) -> dict[str, Any]:
    """What `prepare` and `import_indexed` take alike: where shards go, how they are cut, and who hears of it."""

    def show(report: PrepareReport, part: float | None) -> None:
        tokens = sum(report.tokens.values())
        display.update(f"{report.documents_in:,} documents, {tokens / 1e6:,.1f} M tokens", part)

    return {
        "out_dir": arguments.out,
        "held_out_fraction": arguments.held_out,
        "shard_tokens": arguments.shard_tokens,
        "workers": arguments.workers,
        "overwrite": arguments.overwrite,
        "progress": show,
    }


def run_import(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        files = [IndexedFile(prefix) for prefix in arguments.prefixes]
        value = [
            {"prefix": file.prefix, "documents": file.num_documents, "tokens": file.num_tokens, "dtype": file.dtype.str}
            for file in files
        ]
        lines = [f"{x['prefix']}: {x['documents']:,} documents, {x['tokens']:,} tokens of {x['dtype']}" for x in value]
        _print(arguments, value, "\n".join(lines))
        return 0
    with Progress("importing") as display:
        report = import_indexed(
            arguments.prefixes,
            arguments.tokenizer,
            **_output_options(arguments, display),
            deduplicate=arguments.deduplicate,
        )
    _print(arguments, dataclasses.asdict(report), report.describe())
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    report = merge(arguments.out, overwrite=arguments.overwrite)
    _print(arguments, dataclasses.asdict(report), report.describe())
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    for manifest in inspection.find_manifests(arguments.path):
        tokenizer = inspection.find_tokenizer(manifest, arguments.tokenizer) if arguments.text else None
        with Progress(f"verifying {manifest.split}") as display:

            def show(done: int, display: Progress = display, total: int = len(manifest.shards)) -> None:
                display.update(f"{done} of {total} shards", done / total)

            report = inspection.verify(manifest, tokenizer, progress=show)
        results[manifest.location] = dataclasses.asdict(report)
    lines = []
    for location, result in results.items():
        lines += [f"BAD  {problem}" for problem in result["problems"]]
        good = result["shards"] - len(result["problems"])
        lines.append(f"{location}: {good} of {result['shards']} shards are whole, {result['documents']:,} documents")
    _print(arguments, results, "\n".join(lines))
    return 1 if any(result["problems"] for result in results.values()) else 0


class RunSamples(Protocol):
    """What a training run read: asked for by `hope data inspect RUN --step` and `hope data decode RUN --sample`."""

    history: DataHistory
    tokenizer_path: str

    def samples_of_step(self, step: int) -> range:
        """Numbers of the samples of a step, counted from 1."""
        ...


def _open_run(arguments: argparse.Namespace) -> RunSamples:
    if arguments.open_run is None:
        raise ManifestError("steps and samples are those of a training run: ask for them with 'hope data'.")
    run: RunSamples = arguments.open_run(arguments.path)
    return run


def _inspect_step(arguments: argparse.Namespace) -> int:
    run = _open_run(arguments)
    samples = run.samples_of_step(arguments.step)
    documents = run.history.documents(samples)
    lines = [f"step {arguments.step}: samples {samples.start} to {samples.stop - 1}, {len(documents)} documents"]
    for found in documents:
        where = f"{found['dataset']}/{found['shard']}" if "dataset" in found else found["shard"]
        origin = f"{found['source']}:{found['position']}"
        lines.append(f"{where} {found['document']:>7}  samples {found['samples']}  {origin}")
    _print(arguments, documents, "\n".join(lines))
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    if arguments.step is not None:
        return _inspect_step(arguments)
    manifest = inspection.find_manifests(arguments.path)[0]
    tokenizer = inspection.find_tokenizer(manifest, arguments.tokenizer)
    shown = []
    for number in range(arguments.document, min(manifest.documents, arguments.document + arguments.count)):
        tokens, where = inspection.document_at(manifest, number)
        text = tokenizer.decode(tokens)
        shown.append({"number": number, **where, "text": text[: arguments.chars] if arguments.chars else text})
    lines = []
    for entry in shown:
        lines.append(f"--- document {entry['number']}: {entry['source']}:{entry['position']}, {entry['tokens']} tokens")
        lines.append(entry["text"])
    _print(arguments, shown, "\n".join(lines))
    return 0


def run_stats(arguments: argparse.Namespace) -> int:
    manifests = inspection.find_manifests(arguments.path)
    lengths = {manifest.split: inspection.document_lengths(manifest) for manifest in manifests}
    stats = {split: inspection.length_stats(some) for split, some in lengths.items()}
    if arguments.png:
        inspection.plot_lengths(lengths, arguments.png)
    lines = []
    for split, value in stats.items():
        lines.append(f"{split}: {value['documents']:,} documents, {value['tokens']:,} tokens")
        if not value["documents"]:
            continue
        quantiles = "  ".join(f"{name} {length:,}" for name, length in value["quantiles"].items())
        lines.append(f"  tokens per document: mean {value['mean']:,.1f}  {quantiles}  longest {value['longest']:,}")
        most = max(documents for _, _, documents, _ in value["histogram"])
        for low, high, documents, tokens in value["histogram"]:
            bar = "#" * round(40 * documents / most)
            lines.append(f"  {low:>9,} to {high - 1:>9,}  {documents:>12,} documents  {tokens:>15,} tokens  {bar}")
    _print(arguments, stats, "\n".join(lines))
    return 0


def run_decode(arguments: argparse.Namespace) -> int:
    if arguments.ids is not None:
        if not arguments.tokenizer:
            raise TokenizerError("token ids need a tokenizer to decode them: name it with --tokenizer.")
        tokenizer, tokens = load_tokenizer(arguments.tokenizer), arguments.ids
    elif arguments.path is None:
        raise ManifestError(
            "name the prepared split that holds the document, e.g. data/corpus/train, or the run of the sample."
        )
    elif arguments.sample is not None:
        run = _open_run(arguments)
        stream, number = run.history.locate(arguments.sample)
        tokenizer = load_tokenizer(arguments.tokenizer or run.tokenizer_path)
        tokens = [token for token in stream.sample(number).tolist() if token != NO_TOKEN]
    else:
        (manifest,) = inspection.find_manifests(arguments.path)[:1]
        tokenizer = inspection.find_tokenizer(manifest, arguments.tokenizer)
        tokens = inspection.document_at(manifest, arguments.document)[0].tolist()
    text = tokenizer.decode(tokens)
    if arguments.json:
        print_whole(json.dumps({"tokens": tokens, "text": text}) + "\n")
    else:
        print_whole(text)  # exactly, without a line end of ours
    return 0


def run_drop(arguments: argparse.Namespace) -> int:
    manifest = Manifest.load(arguments.path)
    unknown = sorted(set(arguments.shards) - {shard.name for shard in manifest.shards})
    if unknown:
        raise ManifestError(
            f"{manifest.location} has no shard {unknown[0]}. It has {len(manifest.shards)}, see its manifest."
        )
    target = Path(manifest.path(arguments.out))
    if target.exists() or target.name != arguments.out or not arguments.out.endswith(".json"):
        raise ManifestError(f"--out {arguments.out} must be the name of a new .json file; it goes beside the manifest.")
    kept = tuple(shard for shard in manifest.shards if shard.name not in arguments.shards)
    smaller = dataclasses.replace(manifest, shards=kept)
    write_json(target, smaller.to_dict())
    value = {"manifest": str(target), "shards": len(kept), "tokens": smaller.tokens, "documents": smaller.documents}
    _print(
        arguments, value, f"{target}: {len(kept)} shards, {smaller.documents:,} documents, {smaller.tokens:,} tokens"
    )
    return 0
