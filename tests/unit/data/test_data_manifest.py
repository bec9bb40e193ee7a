from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ManifestError
from data_pipeline.manifest import Manifest


def test_saved_manifest_loads_equal(tmp_path: Path, manifest: Manifest) -> None:
    manifest.save(tmp_path)
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded.to_dict() == manifest.to_dict() and loaded.digest == manifest.digest
    assert loaded.path("a.tar") == str(tmp_path / "a.tar")


def test_digest_is_of_the_content_not_the_place(dataset: Path, tmp_path: Path) -> None:
    shutil.copy(dataset / "train" / "manifest.json", tmp_path / "manifest.json")
    assert Manifest.load(tmp_path).digest == Manifest.load(dataset / "train").digest
    assert Manifest.load(dataset / "heldout").digest != Manifest.load(dataset / "train").digest


def _set(value: dict[str, Any], path: str, new: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        value = value[int(key)] if isinstance(value, list) else value[key]  # type: ignore[assignment]
    value[last] = new


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "format is 'other'"),
        ("dtype", "<i8", "dtype"),
        ("dtype", "|O", "dtype"),
        ("tokens", 1, "its shards make"),
        ("shards/0/name", "../../etc/passwd.tar", "not of the form"),
        ("shards/0/name", "/abs.tar", "not of the form"),
        ("shards/0/name", "a\nb.tar", "not of the form"),
        ("shards/0/name", "pipe:rm -rf x.tar", "not of the form"),
        ("shards/0/sha256", "123", "not of the form"),
        ("shards/0/tokens", -1, "whole number"),
        ("shards/0/tokens", "7", "whole number"),
        ("shards/0/documents", True, "whole number"),
        ("shards/0/extra", 1, "unknown field 'extra'"),
        ("special_ids/eos", 10**9, "outside the vocabulary"),
        ("special_ids", {}, "'unk' is missing"),
        ("shards", None, "damaged"),
    ],
)
def test_damaged_manifests_are_refused(dataset: Path, tmp_path: Path, path: str, value: Any, message: str) -> None:
    content = json.loads((dataset / "train" / "manifest.json").read_text())
    _set(content, path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_files_that_are_no_manifest_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path)


def test_missing_manifest_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="hope data prepare"):
        Manifest.load(tmp_path)
    with pytest.raises(ManifestError, match="cannot read"):
        Manifest.load("memory://nowhere/train")
