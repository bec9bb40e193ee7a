"""A prepared set as a `webdataset` pipeline, for those who train elsewhere.

    from torch.utils.data import DataLoader
    from data_pipeline import webdataset_pipeline

    pipeline = webdataset_pipeline("data/web/train", shuffle=1000, seed=1).batched(8, collation_fn=None)
    for batch in DataLoader(pipeline, batch_size=None, num_workers=4): ...

Shards are dealt to nodes and workers as webdataset does it, so an epoch gives every document once as long as there are at
least as many shards as workers in all. Exact order and resumption are what `TokenStream` is for.

Our own writer makes the shards, not webdataset's `TarWriter`, although every member is the same to the byte (a test
compares them). TarWriter puts the members of a sample in the order of their names, so shards would get other digests than
those made so far. It streams through blocks of 10,240 bytes, so it cannot say where a document begins, which the index
needs, nor be cut back to a document when an interrupted run goes on. And importing webdataset imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.cache import ShardCache, default_directory
from data_pipeline.manifest import Manifest
from data_pipeline.shards import TOKEN_EXTENSIONS, ShardReader


def webdataset_pipeline(
    manifest: Manifest | str | Path,
    *,
    shuffle: int = 0,
    seed: int = 0,
    end_marks: bool = True,
    verify: bool = True,
    cache_dir: str | Path | None = None,
    cache_bytes: int = 64 << 30,
) -> Any:
    """The documents of a prepared split.

    Args:
        manifest: a `Manifest`, or the path or URL of one (or of its directory).
        shuffle: documents in the buffer out of which the next is drawn; then the order of the shards changes with every
            epoch too. 0 reads all in order.
        seed: of the shuffling.
        end_marks: end every document with the end mark of the tokenizer, as `TokenStream` does.
        verify: check each shard's digest and structure before it is read.
        cache_dir: where shards from a store are kept; the user's cache directory by default.
        cache_bytes: what they may take there.

    Returns:
        A ``webdataset.DataPipeline`` of dicts: ``tokens``, int64 [num_tokens]; ``json``, the provenance; ``__key__``,
        ``__url__``.

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError: (on reading) a shard is missing or has changed.
    """
    import webdataset as wds  # brings torch

    if not isinstance(manifest, Manifest):
        manifest = Manifest.load(manifest)
    end = [manifest.eos_id] if end_marks else []
    remote = "://" in manifest.location
    cache = (Path(cache_dir or default_directory()), cache_bytes) if remote else None
    stages = [
        wds.SimpleShardList([info.name for info in manifest.shards]),
        *([wds.detshuffle(len(manifest.shards), seed=seed)] if shuffle else []),
        wds.split_by_node,
        wds.split_by_worker,
        partial(_local_shards, manifest=manifest, verify=verify, cache=cache),
        wds.tarfile_to_samples(),
        wds.map(partial(_decode, dtype=manifest.dtype, end=np.array(end, dtype=np.int64))),
        *([wds.detshuffle(shuffle, seed=seed)] if shuffle else []),
    ]
    return wds.DataPipeline(*stages)


def _local_shards(
    source: Iterable[dict[str, str]], *, manifest: Manifest, verify: bool, cache: tuple[Path, int] | None
) -> Iterator[dict[str, str]]:
    """The shards that are this worker's, as paths of checked files. A path, unlike a name, is never a command to run."""
    infos = {info.name: info for info in manifest.shards}
    store = ShardCache(*cache) if cache is not None else None
    for entry in source:
        info = infos[entry["url"]]
        path = store.fetch(manifest, info) if store is not None else Path(os.path.abspath(manifest.path(info.name)))
        ShardReader(path, info, manifest.token_dtype, verify=verify)
        yield {**entry, "url": str(path)}


def _decode(sample: dict[str, Any], dtype: str, end: np.ndarray) -> dict[str, Any]:
    tokens = np.frombuffer(sample.pop(TOKEN_EXTENSIONS[dtype]), dtype=dtype).astype(np.int64)
    return {**sample, "tokens": np.concatenate([tokens, end]), "json": json.loads(sample["json"])}
