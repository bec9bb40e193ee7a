"""Looking into prepared data: are they whole, what do they say, how long are the documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, ManifestError, SamplingError, ShardError, TokenizerError, require
from data_pipeline.files import atomic_file
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ShardInfo
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare import SPLITS
from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer, tokenizer_beside


def find_manifests(path: str | Path) -> list[Manifest]:
    """The manifest at a path, or those of all splits of a prepared directory."""
    found = [str(Path(path) / split) for split in SPLITS if (Path(path) / split / MANIFEST_NAME).exists()]
    return [_local(Manifest.load(split)) for split in found or [str(path)]]


def _local(manifest: Manifest) -> Manifest:
    if "://" in manifest.location:
        raise ManifestError(f"{manifest.location} is remote: copy it here to look into it, or ask for a step of a run.")
    return manifest


def find_tokenizer(manifest: Manifest, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a manifest: the given model, or the one stored beside the splits; another one is refused."""
    chosen = Path(path) if path is not None else tokenizer_beside(Path(manifest.location).parent)
    tokenizer = load_tokenizer(chosen)
    if tokenizer.digest != manifest.tokenizer_sha256:
        raise TokenizerError(
            f"{chosen} (SHA-256 {tokenizer.digest[:16]}...) is not the tokenizer of {manifest.location} "
            f"({manifest.tokenizer_sha256[:16]}...). Name the right one with --tokenizer."
        )
    return tokenizer


# ---- verify --------------------------------------------------------------------------------------------------------


@dataclass
class VerifyReport:
    """What was checked, and everything that is wrong."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    manifest: Manifest,
    tokenizer: Tokenizer | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check every shard: size, digests, the structure of the tar, provenance, the range of the token ids.

    Args:
        manifest: of local shards.
        tokenizer: with it, every document is decoded and the text compared to the SHA-256 in its provenance.
        threads: shards checked at a time; all cores by default.
        progress: called with the number of shards checked so far.
    """
    _local(manifest)
    report = VerifyReport()
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda info: _verify_shard(manifest, info, tokenizer), manifest.shards)
        for info, problem in zip(manifest.shards, results, strict=True):
            report.shards += 1
            if problem is None:
                report.documents += info.documents
                report.tokens += info.tokens
            else:
                report.problems.append(problem)
            if progress is not None:
                progress(report.shards)
    return report


def _verify_shard(manifest: Manifest, info: ShardInfo, tokenizer: Tokenizer | None) -> str | None:
    try:
        reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
        for number, (tokens, provenance) in enumerate(reader.documents()):
            _check_document(reader, number, tokens, provenance, manifest, tokenizer)
    except DataError as error:
        return str(error)
    return None


def _check_document(
    reader: ShardReader,
    number: int,
    tokens: np.ndarray,
    provenance: dict[str, Any],
    manifest: Manifest,
    tokenizer: Tokenizer | None,
) -> None:
    if len(tokens) and int(tokens.max()) >= manifest.vocab_size:
        raise ShardError(
            f"document {number} of {reader.path} holds token id {tokens.max()}, outside the vocabulary of "
            f"{manifest.vocab_size}. Prepare the data again."
        )
    if tokenizer is not None and tokenizer.is_exact:
        text = tokenizer.decode(tokens)
        if hashlib.sha256(text.encode("utf-8")).hexdigest() != provenance.get("sha256"):
            raise ShardError(f"document {number} of {reader.path} is not the text that its provenance names.")


# ---- inspect, decode -----------------------------------------------------------------------------------------------


def document_at(manifest: Manifest, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Token ids and provenance of a document by its number in the whole split, with its shard and number there."""
    if not 0 <= number < manifest.documents:
        raise SamplingError(f"document {number} does not exist: {manifest.location} holds {manifest.documents}.")
    local = number
    for info in manifest.shards:
        if local < info.documents:
            reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
            return reader.document(local), {"shard": info.name, "document": local, **reader.provenance(local)}
        local -= info.documents
    raise AssertionError("documents of the shards add up to those of the manifest")


# ---- stats ---------------------------------------------------------------------------------------------------------


def document_lengths(manifest: Manifest) -> np.ndarray:
    """Tokens of every document, without end marks: int64 [num_documents]. Read from the indexes alone."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *_index_lengths(manifest)])


def _index_lengths(manifest: Manifest) -> Iterator[np.ndarray]:
    for info in manifest.shards:
        yield ShardReader(manifest.path(info.name), info, manifest.token_dtype, verify=False).lengths


def length_stats(lengths: np.ndarray) -> dict[str, Any]:
    """Counts, quantiles, and a histogram whose bins double in width: ``[from, below, documents, tokens]`` each."""
    if not len(lengths):
        return {"documents": 0, "tokens": 0, "histogram": []}
    quantiles = np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
    edges = [0, *(1 << power for power in range(int(lengths.max()).bit_length() + 1))]
    bins = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(bins, minlength=len(edges))
    tokens = np.bincount(bins, weights=lengths, minlength=len(edges))
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "mean": float(lengths.mean()),
        "quantiles": dict(zip(("5%", "25%", "50%", "75%", "95%"), map(int, quantiles), strict=True)),
        "histogram": [
            [low, high, int(count), int(total)]
            for low, high, count, total in zip(edges[:-1], edges[1:], documents, tokens, strict=False)
            if count
        ],
    }


def plot_lengths(lengths: dict[str, np.ndarray], path: str | Path) -> None:
    """Histograms of document lengths on a logarithmic axis, one line per split, as a PNG."""
    require("matplotlib", purpose="drawing a histogram", install="matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max((int(some.max()) for some in lengths.values() if len(some)), default=1)
    bins = np.geomspace(1, max(2, longest + 1), 60).tolist()
    for name, some in lengths.items():
        axes.hist(some, bins=bins, histtype="step", linewidth=1.5, label=f"{name}: {len(some):,} documents")
    axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents", title="Document lengths")
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
