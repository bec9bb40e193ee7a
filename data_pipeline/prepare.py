"""`prepare`: from sources of text to verified token shards with a held-out split.

One process reads, decides and writes, in the order of the sources; worker processes decode, filter and tokenize. The
result therefore depends on the sources and the settings alone, not on the number of workers. What has been written is
made safe every few seconds together with the position in the sources, so an interrupted run continues there and ends
with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from data_pipeline.corpus import (
    FIELDS_SHOWN,
    Document,
    ReadOptions,
    SourceFile,
    describe_missing_field,
    find_sources,
    read_documents,
)
from data_pipeline.dedup import SEEN_NAMES, SeenDocuments
from data_pipeline.encode import EncodedDocument, Encoder, encode_all
from data_pipeline.errors import EmptySplitError, OutputError, ShardError
from data_pipeline.files import canonical_json, exclusive, read_json, write_json, writing
from data_pipeline.filters import Filters
from data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_NAMES, WIDS_NAME, Manifest, ShardInfo
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare_settings import Settings
from data_pipeline.report import PrepareReport
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Sources
from data_pipeline.streams import size_of
from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "heldout"
SPLITS = (TRAIN, HELD_OUT)
SUMMARY_NAME = "prepare.json"
PROGRESS_NAME = ".progress.json"
FORMAT = "hope-prepare-v1"


class Running(TypedDict, total=False):
    """What does not change the result.

    workers: processes that tokenize; all cores of this process by default. overwrite: remove an earlier result first. progress:
    called about once a second with the counts so far and the part of the input that is read, 0 to 1 (None when the sources do not
    say how large they are). commit_seconds: time between two points from which an interrupted run can continue (5).
    """

    workers: int | None
    overwrite: bool
    progress: Callable[[PrepareReport, float | None], None] | None
    commit_seconds: float


Reader = Callable[[SourceFile, ReadOptions], Iterator[Document]]
"""The documents of a file, in order."""


def prepare(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    out_dir: str | Path,
    *,
    held_out_fraction: float = 0.01,
    shard_tokens: int = 1 << 24,
    read: ReadOptions | None = None,
    filters: Filters | None = None,
    deduplicate: bool = True,
    near_duplicates: float | None = None,
    slice: tuple[int, int] = (0, 1),
    follow_links: bool = False,
    **running: Unpack[Running],
) -> PrepareReport:
    """Write ``out_dir/train`` and ``out_dir/heldout``: shards, index and ``manifest.json`` each.

    Args:
        sources: files, directories, globs, URLs, or ``"python-stdlib"``.
        tokenizer: a `Tokenizer`, or the path of a SentencePiece model or a tokenizer.json.
        out_dir: made if missing. Refused if it holds the result of other settings, unless ``overwrite``.
        held_out_fraction: part of the documents, chosen by the hash of their text, that goes to ``heldout``.
        shard_tokens: tokens from which a new shard begins; documents are never cut.
        read: how files become documents.
        filters: which documents are kept.
        deduplicate: reject documents whose text occurred before.
        near_duplicates: reject documents of at least this estimated similarity with an earlier one, in (0, 1].
        slice: ``(i, n)``: only every n-th source file from the i-th, into ``out_dir/slice-i-of-n``, for `merge`.
        follow_links: read links that lead out of a directory or pattern too.
        running: see `Running`.

    Raises:
        SourceError, TokenizerError, OutputError, EmptySplitError: each with the remedy.
    """
    settings = Settings(
        held_out_fraction,
        shard_tokens,
        read or ReadOptions(),
        filters or Filters(),
        deduplicate,
        near_duplicates,
        *slice,
    )
    settings.check()
    found = find_sources(sources, follow_links=follow_links)
    found.files = found.files[settings.slice_index :: settings.slice_count]
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    directory = Path(out_dir)
    if settings.slice_count > 1:
        directory = directory / slice_name(*slice)
    return prepare_files(found, tokenizer, directory, settings, **running)


def prepare_files(
    found: Sources,
    tokenizer: Tokenizer,
    directory: Path,
    settings: Settings,
    *,
    reader: Reader = read_documents,
    encoder: Encoder | None = None,
    format_name: str = FORMAT,
    **running: Unpack[Running],
) -> PrepareReport:
    """`prepare`, of files that are found already.

    Args:
        reader: the documents of one file, in order.
        encoder: what makes tokens of a document; of its text by default.
        format_name: tells the results of one kind of reading from those of another.
    """
    encoder = encoder or Encoder(
        tokenizer,
        settings.filters,
        settings.read.text_field,
        with_signature=settings.near_duplicates is not None,
    )
    settings.check()
    with exclusive(directory):
        run = _Preparation(found, encoder, directory, settings, reader, format_name)
        if running.get("overwrite"):
            remove_result(directory)
        workers = _number_of_workers(running.get("workers"), found.files)
        return run.run(workers, running.get("progress"), running.get("commit_seconds", 5.0))


def slice_name(index: int, count: int) -> str:
    return f"slice-{index:05d}-of-{count:05d}"


def _number_of_workers(workers: int | None, files: list[SourceFile]) -> int:
    if workers is not None:
        return max(1, workers)
    small = sum(file.size or 1 << 30 for file in files) < 1 << 22  # starting processes would take longer than the work
    return 1 if small else len(os.sched_getaffinity(0))


def remove_result(directory: Path) -> None:
    """Remove what `prepare` or `merge` wrote to a directory, by name, and nothing else."""
    patterns = (MANIFEST_NAME, WIDS_NAME, "shard-*.tar", "shard-*.idx", ".shard-*.partial")
    with writing(directory):
        for name in (
            SUMMARY_NAME,
            PROGRESS_NAME,
            *TOKENIZER_NAMES,
            *SEEN_NAMES,
        ):  # what says that it is complete goes first
            (directory / name).unlink(missing_ok=True)
        for split in (directory / name for name in SPLITS):
            for path in itertools.chain.from_iterable(map(split.glob, patterns)):
                path.unlink()
            if split.is_dir() and not any(split.iterdir()):
                split.rmdir()


def refuse_foreign_files(directory: Path) -> None:
    """Raise OutputError if the splits of a directory hold shards that nobody there can have written."""
    for split in (directory / name for name in SPLITS):
        if (split / MANIFEST_NAME).exists() or any(split.glob("shard-*.tar")):
            raise OutputError(
                f"{split} holds shards of another origin. Choose another directory, or replace them with "
                f"overwrite=True (--overwrite)."
            )


def in_held_out(sha256: bytes, fraction: float) -> bool:
    """The split of a document depends on its text alone: more data or another order never moves it."""
    return int.from_bytes(sha256[:8], "big") < int(fraction * 2**64)


@dataclass
class _Counts:
    """Where the run stands: the position in the sources and what became of the documents before it."""

    file: int = 0  # number of the source file
    position: int = 0  # documents of that file that are done
    documents_in: int = 0
    text_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    text_fields: list[str] = field(default_factory=list)  # of records that have not the field asked for


class _Preparation:
    """One run, from the first or the last committed document to the manifests."""

    def __init__(
        self, sources: Sources, encoder: Encoder, directory: Path, settings: Settings, reader: Reader, format_name: str
    ) -> None:
        files, tokenizer = sources.files, encoder.tokenizer
        self._encoder, self._reader = encoder, reader
        self._files, self._left_out = files, sources.left_out
        self._tokenizer, self._directory, self._settings = tokenizer, directory, settings
        self._bytes_before = list(itertools.accumulate(map(size_of, files), initial=0))
        self._file_numbers = {file.name: number for number, file in enumerate(files)}
        self._splits = SPLITS if settings.held_out_fraction else (TRAIN,)
        self._identity = {
            "format": format_name,
            "tokenizer_sha256": tokenizer.digest,
            "sources_sha256": hashlib.sha256(canonical_json([asdict(file) for file in files])).hexdigest(),
            "settings": json.loads(canonical_json(asdict(settings))),
        }

    def run(
        self, workers: int, progress: Callable[[PrepareReport, float | None], None] | None, commit_seconds: float
    ) -> PrepareReport:
        started = last_commit = last_progress = time.monotonic()
        if (summary := self._read(SUMMARY_NAME)) is not None:
            log.info("%s is already complete", self._directory)
            return self._checked_report(PrepareReport(**summary["report"]))
        self._open()
        try:
            for document in encode_all(self._documents(), self._encoder, workers):
                self._take(document)
                now = time.monotonic()
                if now - last_commit >= commit_seconds:
                    self._commit()
                    last_commit = now
                if progress is not None and now - last_progress >= 1.0:
                    progress(self._report(), self._part_read(document))
                    last_progress = now
            self._commit()
            self._refuse_empty_splits()
            report = self._finish()
        finally:
            self._close()
        if progress is not None:
            progress(report, 1.0)
        return replace(report, manifests=manifest_paths(self._directory), seconds=time.monotonic() - started)

    # ---- one document

    def _documents(self) -> Iterator[Document]:
        """The documents that are not yet done."""
        first, done = self._counts.file, self._counts.position
        for number in range(first, len(self._files)):
            documents = self._reader(self._files[number], self._settings.read)
            yield from itertools.islice(documents, done if number == first else 0, None)

    def _take(self, document: EncodedDocument) -> None:
        counts = self._counts
        counts.file, counts.position = self._file_numbers[document.source], document.position + 1
        counts.documents_in += 1
        if reason := document.reason or self._seen.admit(document.sha256, document.signature):
            counts.rejected[reason] += 1
            new_fields = [name for name in document.fields if name not in counts.text_fields]
            counts.text_fields += new_fields[: FIELDS_SHOWN - len(counts.text_fields)]
            return
        assert document.tokens is not None
        counts.text_bytes += document.num_bytes
        split = HELD_OUT if in_held_out(document.sha256, self._settings.held_out_fraction) else TRAIN
        provenance = {
            "source": document.source,
            "position": document.position,
            "sha256": document.sha256.hex(),
            "bytes": document.num_bytes,
            "tokens": len(document.tokens),
        }
        self._writers[split].add(document.tokens, provenance)

    # ---- what survives an interruption

    def _read(self, name: str) -> dict[str, Any] | None:
        """A state file of this very run, None if there is none; one of other settings is refused."""
        path = self._directory / name
        if not path.exists():
            return None
        state: dict[str, Any] = read_json(path)
        changed = [key.removesuffix("_sha256") for key in self._identity if state.get(key) != self._identity[key]]
        if changed:
            raise OutputError(
                f"{self._directory} holds the result of another run: other {' and '.join(changed)}. "
                f"Choose another directory, or replace it with overwrite=True (--overwrite)."
            )
        return state

    def _open(self) -> None:
        state = self._read(PROGRESS_NAME)
        if state is not None:
            for split in self._splits:  # shards are opened again: until the end, nothing here is complete
                with writing(self._directory):
                    (self._directory / split / MANIFEST_NAME).unlink(missing_ok=True)
        else:
            refuse_foreign_files(self._directory)
            state = {"counts": {}, "seen": [0, 0], "writers": {}}
        self._counts = _Counts(**state["counts"])
        self._counts.rejected = Counter(self._counts.rejected)
        self._seen = SeenDocuments(
            self._directory,
            exact=self._settings.deduplicate,
            near_threshold=self._settings.near_duplicates,
            sizes=state["seen"],
        )
        self._writers = {
            split: ShardWriter(
                self._directory / split,
                self._tokenizer.token_dtype,
                self._settings.shard_tokens,
                state["writers"].get(split),
                key_prefix=f"s{self._settings.slice_index:05d}_" if self._settings.slice_count > 1 else "",
            )
            for split in self._splits
        }
        if self._counts.documents_in:
            log.info("continuing after %d documents", self._counts.documents_in)
        else:
            self._commit()  # from here on, what lies in the directory is known to be ours

    def _commit(self) -> None:
        state = {
            "counts": vars(self._counts),
            "seen": self._seen.commit(),
            "writers": {split: writer.commit() for split, writer in self._writers.items()},
        }
        write_json(self._directory / PROGRESS_NAME, {**self._identity, **state})

    def _close(self) -> None:
        self._seen.close()
        for writer in self._writers.values():
            writer.close()

    # ---- the end

    def _refuse_empty_splits(self) -> None:
        """A split without documents is an error; in a slice it is not, since its part of the corpus may be small."""
        empty = [split for split, writer in self._writers.items() if not writer.documents]
        if not empty or self._settings.slice_count > 1:
            return
        report = self._report()
        self._close()
        remove_result(self._directory)
        if not report.documents_out:
            raise EmptySplitError(self._describe_nothing_kept(report))
        raise EmptySplitError(
            f"no document of {report.documents_out} falls into {empty[0]} at "
            f"held_out_fraction={self._settings.held_out_fraction}. Give more documents, change the fraction, or make "
            f"documents smaller: text_unit='chunk' (--text-unit chunk) cuts long text files."
        )

    def _describe_nothing_kept(self, report: PrepareReport) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.rejected.items()))
        said = f"none of the {report.documents_in} documents was kept (rejected: {reasons or 'none'})."
        if "missing_field" in report.rejected:
            return f"{said} There is {describe_missing_field(self._settings.read.text_field, report.text_fields)}"
        if "too_long" in report.rejected:
            return f"{said} text_unit='chunk' (--text-unit chunk) cuts long text files; or loosen the limits."
        return f"{said} Give text, or loosen the limits."

    def _finish(self) -> PrepareReport:
        """Seal the shards, then write what makes the directory complete, the summary last."""
        self._tokenizer.save(self._directory / self._tokenizer.file_name)
        shards = {split: writer.finish() for split, writer in self._writers.items()}
        for split, some in shards.items():
            save_split(self._directory / split, split, some, self._tokenizer)
        report = self._report()
        write_json(self._directory / SUMMARY_NAME, {**self._identity, "report": asdict(report)})
        with writing(self._directory):
            for name in (PROGRESS_NAME, *SEEN_NAMES):
                (self._directory / name).unlink(missing_ok=True)
        return report

    def _part_read(self, document: EncodedDocument) -> float | None:
        """The part of all bytes of the sources, as they are stored, that has been read."""
        number = self._file_numbers[document.source]
        if any(file.size is None for file in self._files):
            return None
        return min(1.0, (self._bytes_before[number] + document.file_bytes) / max(1, self._bytes_before[-1]))

    def _report(self) -> PrepareReport:
        return PrepareReport(
            documents_in=self._counts.documents_in,
            documents={split: writer.documents for split, writer in self._writers.items()},
            tokens={split: writer.tokens for split, writer in self._writers.items()},
            shards={split: len(writer.shards) for split, writer in self._writers.items()},
            rejected=dict(sorted(self._counts.rejected.items())),
            text_bytes=self._counts.text_bytes,
            files=len(self._files),
            left_out=self._left_out.to_dict(),
            text_fields=self._counts.text_fields,
        )

    def _checked_report(self, report: PrepareReport) -> PrepareReport:
        """The report of an earlier run, if its shards are still there in full length."""
        for path in manifest_paths(self._directory).values():
            manifest = Manifest.load(path)
            for shard in manifest.shards:
                file = Path(manifest.path(shard.name))
                if not file.exists() or file.stat().st_size != shard.bytes:
                    raise ShardError(f"{file} is missing or damaged. Prepare again with overwrite=True (--overwrite).")
        return replace(report, manifests=manifest_paths(self._directory))


def manifest_paths(directory: Path) -> dict[str, str]:
    """The manifests of a prepared directory, by split."""
    paths = {split: directory / split / MANIFEST_NAME for split in SPLITS}
    return {split: str(path) for split, path in paths.items() if path.exists()}


def save_split(directory: Path, split: str, shards: tuple[ShardInfo, ...], tokenizer: Tokenizer) -> None:
    """Write the manifest of a split whose shards are sealed."""
    Manifest(
        split=split,
        shards=shards,
        tokenizer_sha256=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        dtype=tokenizer.token_dtype.str,
    ).save(directory)
