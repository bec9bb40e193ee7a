from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.cache import ShardCache, shard_size
from data_pipeline.errors import CorruptShardError, ManifestError, SamplingError, ShardError
from data_pipeline.ledger import Ledger
from data_pipeline.manifest import Manifest
from data_pipeline.stream import TokenStream

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402


class UnreliableStore(MemoryFileSystem):
    """An object store that fails as often as it is told to, in the way it is told to."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012 - the library's own design
    failures = 0
    mode = "refuse"
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("unreliable://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb" and path.endswith((".tar", ".idx")):
            UnreliableStore.opened.append(path)
            if UnreliableStore.failures > 0:
                UnreliableStore.failures -= 1
                if UnreliableStore.mode == "refuse":
                    raise ConnectionError("the store is away")
                data = super()._open(path, mode, **options).read()
                return fsspec.implementations.memory.MemoryFile(data=data[:-100])  # breaks off without an error
        return super()._open(path, mode, **options)


@pytest.fixture
def remote(manifest: Manifest) -> Iterator[Manifest]:
    fsspec.register_implementation("unreliable", UnreliableStore, clobber=True)
    UnreliableStore.failures, UnreliableStore.opened = 0, []
    store = fsspec.filesystem("unreliable")
    for path in Path(manifest.location).iterdir():
        if path.is_file():
            store.pipe(f"/train/{path.name}", path.read_bytes())
    yield Manifest.load("unreliable://train")
    UnreliableStore.store.clear()


def test_remote_samples_are_the_local_ones(tmp_path: Path, remote: Manifest, manifest: Manifest) -> None:
    assert remote.digest == manifest.digest
    local = TokenStream(manifest, 16, seed=1)
    stream = TokenStream(remote, 16, seed=1, cache=ShardCache(tmp_path))
    for number in range(0, local.num_samples, 7):
        assert np.array_equal(stream.sample(number), local.sample(number))


@pytest.mark.parametrize("mode", ["refuse", "truncate"])
def test_failed_downloads_are_tried_again(tmp_path: Path, remote: Manifest, mode: str) -> None:
    UnreliableStore.mode, UnreliableStore.failures = mode, 3
    cache = ShardCache(tmp_path, attempts=4, backoff_seconds=0.001)
    path = cache.fetch(remote, remote.shards[0])
    assert path.stat().st_size == remote.shards[0].bytes
    UnreliableStore.failures = 4
    with pytest.raises(ShardError, match=r"cannot fetch .*shard-000001\.(idx|tar): .*\(4 attempts\)"):
        cache.fetch(remote, remote.shards[1])
    assert cache.fetch(remote, remote.shards[1]).exists()  # the store is back, and nothing is left half-way
    assert not list(tmp_path.rglob("*.tmp"))


def test_pauses_grow(tmp_path: Path, remote: Manifest) -> None:
    UnreliableStore.mode, UnreliableStore.failures = "refuse", 3
    started = time.monotonic()
    ShardCache(tmp_path, attempts=4, backoff_seconds=0.05).fetch(remote, remote.shards[0])
    assert time.monotonic() - started > 0.5 * (0.05 + 0.1 + 0.2)


def test_cache_stays_within_its_bound_and_drops_the_oldest(tmp_path: Path, remote: Manifest) -> None:
    sizes = [shard_size(info) for info in remote.shards]
    cache = ShardCache(tmp_path, max_bytes=3 * max(sizes))
    for number, info in enumerate(remote.shards):
        cache.fetch(remote, remote.shards[0])  # in use all the time
        cache.fetch(remote, info)
        assert cache.used_bytes() <= cache.max_bytes
        assert (tmp_path / remote.shards[0].sha256 / "shard.tar").exists(), number
    small = ShardCache(tmp_path / "small", max_bytes=100)
    with pytest.raises(ShardError, match="does not fit"):
        small.fetch(remote, remote.shards[0])


def test_many_threads_fetch_a_shard_once(tmp_path: Path, remote: Manifest) -> None:
    caches = [ShardCache(tmp_path) for _ in range(6)]  # as processes of one machine would
    threads = [threading.Thread(target=cache.fetch, args=(remote, remote.shards[0])) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(UnreliableStore.opened) == 2  # the tar and its index


def test_prefetch_brings_the_next_shards(tmp_path: Path, remote: Manifest) -> None:
    cache = ShardCache(tmp_path)
    stream = TokenStream(remote, 16, shuffle_shards=1, cache=cache)
    stream.sample(0)
    cache.close()  # waits for what is under way
    assert len(set(UnreliableStore.opened)) >= 2


def test_decayed_copies_are_fetched_again(tmp_path: Path, remote: Manifest, manifest: Manifest) -> None:
    cache = ShardCache(tmp_path)
    for info in remote.shards:
        path = cache.fetch(remote, info)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    stream, local = TokenStream(remote, 16, cache=cache), TokenStream(manifest, 16)
    assert all(np.array_equal(stream.sample(n), local.sample(n)) for n in range(0, local.num_samples, 11))


def test_bad_bytes_in_the_store_are_refused(tmp_path: Path, remote: Manifest) -> None:
    fsspec.filesystem("unreliable").pipe(f"/train/{remote.shards[0].name}", b"x" * remote.shards[0].bytes)
    with pytest.raises(CorruptShardError, match="SHA-256"):
        ShardCache(tmp_path, attempts=2, backoff_seconds=0.0).fetch(remote, remote.shards[0])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    cache = ShardCache(tmp_path / "cache", attempts=2, backoff_seconds=0.0)
    stream = TokenStream(remote, 16, cache=cache, skip_corrupt=ledger)
    tokens = np.concatenate([stream.sample(number) for number in range(stream.num_samples)])
    assert 0 < (tokens < 0).sum() < len(tokens)
    assert [entry["shard"] for entry in ledger.entries()] == [remote.shards[0].name]


def test_remote_data_need_a_cache_of_sufficient_size(tmp_path: Path, remote: Manifest) -> None:
    with pytest.raises(ManifestError, match="ShardCache"):
        TokenStream(remote, 16)
    with pytest.raises(SamplingError, match="lower shuffle_shards"):
        TokenStream(remote, 16, cache=ShardCache(tmp_path, max_bytes=shard_size(remote.shards[0])))
    missing = replace(remote, shards=(replace(remote.shards[0], name="gone.tar"), *remote.shards[1:]))
    with pytest.raises(ShardError, match="gone"):
        ShardCache(tmp_path, attempts=1).fetch(missing, missing.shards[0])
