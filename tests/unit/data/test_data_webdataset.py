"""A prepared set through webdataset itself: every document once, over workers and nodes, as our own reader gives it."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_pipeline import webdataset_pipeline
from data_pipeline.errors import CorruptShardError
from data_pipeline.files import canonical_json
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader


def ours(manifest: Manifest, end: tuple[int, ...] = (2,)) -> list[tuple[tuple[int, ...], str]]:
    """(tokens with their end mark, digest of the text) of every document, in order."""
    found = []
    for info in manifest.shards:
        reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
        found += [((*tokens.tolist(), *end), where["sha256"]) for tokens, where in reader.documents()]
    return found


def seen(samples: Any) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(sample["tokens"].tolist()), sample["json"]["sha256"]) for sample in samples]


def test_documents_in_order_with_and_without_end_marks(dataset: Path, manifest: Manifest) -> None:
    assert seen(webdataset_pipeline(dataset / "train")) == ours(manifest)
    assert seen(webdataset_pipeline(manifest, end_marks=False)) == ours(manifest, ())
    sample = next(iter(webdataset_pipeline(manifest)))
    assert sample["tokens"].dtype == np.int64 and sample["__key__"] == "000000_00000000"


def test_shuffling_is_by_seed_and_epoch_and_loses_nothing(manifest: Manifest) -> None:
    first, second = webdataset_pipeline(manifest, shuffle=50, seed=1), webdataset_pipeline(manifest, shuffle=50, seed=1)
    epochs = [seen(first), seen(first)]
    assert epochs[0] == seen(second) != epochs[1] and epochs[0] != ours(manifest)
    assert all(sorted(epoch) == sorted(ours(manifest)) for epoch in epochs)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_nodes_share_the_documents(
    manifest: Manifest, nodes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.data import DataLoader

    total: Counter[Any] = Counter()
    monkeypatch.setenv("WORLD_SIZE", str(nodes))
    for rank in range(nodes):
        monkeypatch.setenv("RANK", str(rank))
        part = seen(DataLoader(webdataset_pipeline(manifest), batch_size=None, num_workers=workers, collate_fn=_same))
        assert 0 < len(part) <= manifest.documents
        total.update(part)
    assert total == Counter(ours(manifest))


def _same(sample: Any) -> Any:
    return sample


def test_shards_in_a_store_come_through_the_cache(manifest: Manifest, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    for path in Path(manifest.location).iterdir():
        memory.pipe(f"/wds/{path.name}", path.read_bytes())
    try:
        assert seen(webdataset_pipeline("memory://wds", cache_dir=tmp_path)) == ours(manifest)
        assert len(list(tmp_path.glob("*/shard.tar"))) == len(manifest.shards)
    finally:
        memory.rm("/wds", recursive=True)


def test_changed_shards_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(manifest.location, tmp_path / "train")
    path = tmp_path / "train" / manifest.shards[1].name
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptShardError, match=path.name):
        list(webdataset_pipeline(tmp_path / "train"))


def test_a_directory_named_like_a_command_is_none(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(manifest.location, tmp_path / "pipe:touch canary #")
    assert len(list(webdataset_pipeline("pipe:touch canary #"))) == manifest.documents
    assert not (tmp_path / "canary").exists()


def test_members_are_those_of_webdatasets_own_writer(manifest: Manifest) -> None:
    info = manifest.shards[1]
    reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for i, (tokens, where) in enumerate(reader.documents()):
            key = {"__key__": f"000001_{i:08d}"}
            writer.write({**key, "u16": tokens.tobytes()})  # both at once it would sort by name
            writer.write({**key, "json": canonical_json(where)})
    content = bytes(reader.buffer)
    assert buffer.getvalue().rstrip(b"\0") == content.rstrip(b"\0")
