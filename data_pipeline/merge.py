"""`merge`: the slices that the tasks of an array prepared become one data set.

Shards are linked, not copied. Where a document of one slice occurs in an earlier slice too, its shard is written anew
without it, so the result holds no exact duplicate, as if it had been prepared in one piece. (Near-duplicates are only
looked for within a slice.)
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import EmptySplitError, OutputError
from data_pipeline.files import exclusive, read_json, write_json, writing
from data_pipeline.manifest import Manifest
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare import (
    FORMAT,
    PROGRESS_NAME,
    SPLITS,
    SUMMARY_NAME,
    TRAIN,
    PrepareReport,
    manifest_paths,
    refuse_foreign_files,
    remove_result,
    save_split,
    slice_name,
)
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.tokenizer import tokenizer_beside

log = logging.getLogger(__name__)

MERGING_NAME = ".merging.json"  # there while a merge runs: what a killed one left is its own, to be replaced


def merge(out_dir: str | Path, *, overwrite: bool = False) -> PrepareReport:
    """Join the slices in ``out_dir``, once all of them are complete.

    Args:
        out_dir: the directory that every slice was prepared with.
        overwrite: replace an earlier result. The slices stay.

    Raises:
        OutputError: slices are missing, unfinished, or made with different settings; or the directory holds shards, or an
            unfinished preparation, that no merge has written.
        ShardError: a shard of a slice is damaged.
    """
    directory = Path(out_dir)
    if not directory.is_dir():
        raise OutputError(f"{directory} does not exist: prepare its slices first (hope data prepare --slice i/n).")
    with exclusive(directory):
        slices = _load_slices(directory)
        identity = {
            "format": FORMAT,
            "tokenizer_sha256": slices[0]["tokenizer_sha256"],
            "sources_sha256": [slice_["sources_sha256"] for slice_ in slices],
            "settings": slices[0]["settings"],
        }
        summary = directory / SUMMARY_NAME
        if summary.exists() and not overwrite:
            found = read_json(summary)
            if {key: found.get(key) for key in identity} != identity:
                raise OutputError(f"{directory} holds another result. Replace it with overwrite=True (--overwrite).")
            return replace(PrepareReport(**found["report"]), manifests=manifest_paths(directory))
        merging = directory / MERGING_NAME
        if not (overwrite or merging.exists()):
            _refuse_what_is_not_ours(directory)
        write_json(merging, identity)
        remove_result(directory)
        report = _Merge(directory, slices).run()
        write_json(summary, {**identity, "report": asdict(report)})
        with writing(merging):
            merging.unlink()
        return replace(report, manifests=manifest_paths(directory))


def _refuse_what_is_not_ours(directory: Path) -> None:
    if (directory / PROGRESS_NAME).exists():
        raise OutputError(
            f"{directory} holds a preparation in one piece that was not finished. Finish it (the same hope data prepare "
            f"again), or replace it with overwrite=True (--overwrite)."
        )
    refuse_foreign_files(directory)


def _load_slices(directory: Path) -> list[dict[str, Any]]:
    """The summaries of all slices, in order; refused unless every one is there and of the same settings."""
    found = sorted(path.name for path in directory.glob("slice-*-of-*") if path.is_dir())
    if not found:
        raise OutputError(f"{directory} holds no slices. Prepare them first: hope data prepare --slice i/n.")
    counts = {int(name.rpartition("-")[2]) for name in found}
    if len(counts) > 1:
        raise OutputError(f"{directory} holds slices of different divisions ({sorted(counts)}): remove the wrong ones.")
    count = counts.pop()
    unfinished = [i for i in range(count) if not (directory / slice_name(i, count) / SUMMARY_NAME).exists()]
    if unfinished:
        numbers = ", ".join(map(str, unfinished[:10])) + (", ..." if len(unfinished) > 10 else "")
        raise OutputError(f"{len(unfinished)} of {count} slices are not finished: {numbers}. Run them (again) first.")
    slices = [read_json(directory / slice_name(i, count) / SUMMARY_NAME) for i in range(count)]
    for i, slice_ in enumerate(slices):
        slice_["settings"] |= {"slice_index": 0}
        if any(slice_[key] != slices[0][key] for key in ("format", "tokenizer_sha256", "settings")):
            raise OutputError(f"slice {i} was made with another tokenizer or other settings than slice 0. Redo one.")
    return slices


class _Merge:
    def __init__(self, directory: Path, slices: list[dict[str, Any]]) -> None:
        self._directory = directory
        self._paths = [directory / slice_name(i, len(slices)) for i in range(len(slices))]
        self._reports = [PrepareReport(**slice_["report"]) for slice_ in slices]
        self._deduplicate = slices[0]["settings"]["deduplicate"]
        self._seen: set[str] = set()
        self._duplicates = self._duplicate_bytes = 0

    def run(self) -> PrepareReport:
        tokenizer = load_tokenizer(tokenizer_beside(self._paths[0]))
        tokenizer.save(self._directory / tokenizer.file_name)
        writers = {}
        for split in SPLITS if self._reports[0].documents.keys() == set(SPLITS) else (TRAIN,):
            # merged shards that are written anew hold no more tokens than one slice's shard did
            writer = ShardWriter(self._directory / split, tokenizer.token_dtype, 1 << 62, key_prefix="merged_")
            with contextlib.closing(writer):
                for path in self._paths:
                    self._take(Manifest.load(path / split), writer)
                shards = writer.finish()
            if not writer.documents:
                raise EmptySplitError(
                    f"no slice has a document in {split}: change held_out_fraction, or give more text."
                )
            save_split(self._directory / split, split, shards, tokenizer)
            writers[split] = writer
        rejected: Counter[str] = Counter()
        for report in self._reports:
            rejected.update(report.rejected)
        if self._duplicates:
            rejected["duplicate"] += self._duplicates
        return PrepareReport(
            documents_in=sum(report.documents_in for report in self._reports),
            documents={split: writer.documents for split, writer in writers.items()},
            tokens={split: writer.tokens for split, writer in writers.items()},
            shards={split: len(writer.shards) for split, writer in writers.items()},
            rejected=dict(sorted(rejected.items())),
            text_bytes=sum(report.text_bytes for report in self._reports) - self._duplicate_bytes,
            files=sum(report.files for report in self._reports),
            left_out=self._reports[0].left_out,  # every slice finds the same
            text_fields=sorted({name for report in self._reports for name in report.text_fields}),
        )

    def _take(self, manifest: Manifest, writer: ShardWriter) -> None:
        for info in manifest.shards:
            reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
            kept = [number for number in range(info.documents) if self._is_new(reader.provenance(number))]
            if len(kept) == info.documents:
                writer.adopt(reader.path, info)
                continue
            log.info("%s: %d documents occur in an earlier slice", reader.path, info.documents - len(kept))
            for number in kept:
                writer.add(reader.document(number), reader.provenance(number))
            if kept:
                writer.seal()

    def _is_new(self, provenance: dict[str, Any]) -> bool:
        if not self._deduplicate or provenance["sha256"] not in self._seen:
            self._seen.add(provenance["sha256"])
            return True
        self._duplicates += 1
        self._duplicate_bytes += provenance["bytes"]
        return False
