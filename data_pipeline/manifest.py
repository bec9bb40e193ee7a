"""The manifest: what a directory of token shards holds, to the byte.

``manifest.json`` lists every shard with its size, documents, tokens and SHA-256, and names the tokenizer whose ids the
shards hold. It is written last, so a directory with a manifest is complete. Its digest identifies the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import ManifestError, StoreError
from data_pipeline.files import canonical_json, write_json
from data_pipeline.remote import read_bytes

FORMAT = "hope-token-shards-v1"
MANIFEST_NAME = "manifest.json"
WIDS_NAME = "wids.json"
TOKENIZER_NAME = "tokenizer.model"
TOKENIZER_NAMES = (TOKENIZER_NAME, "tokenizer.json")

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """One shard: a tar of whole documents and, beside it, the index of where each lies (see `data_pipeline.shards`)."""

    name: str  # file name of the tar
    bytes: int  # size of the tar
    documents: int
    tokens: int  # without end marks, which the stream adds
    sha256: str  # of the tar
    index_sha256: str  # of the index file

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """The shards of one split, in order, and what their token ids mean."""

    split: str
    shards: tuple[ShardInfo, ...]
    tokenizer_sha256: str
    vocab_size: int
    special_ids: Mapping[str, int]
    dtype: str  # numpy spelling, "<u2" or "<u4"
    location: str = ""  # directory or URL that holds the shards; not part of the content
    name: str = MANIFEST_NAME  # of its file there

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens without end marks."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def eos_id(self) -> int:
        return self.special_ids["eos"]

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: the same shards under another directory have the same digest."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def path(self, name: str) -> str:
        """Where a file of this split lies."""
        return f"{self.location.rstrip('/')}/{name}" if self.location else name

    @property
    def source(self) -> str:
        """Absolute path, or URL, of the manifest itself."""
        return self.path(self.name) if "://" in self.location else os.path.abspath(self.path(self.name))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "split": self.split,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "special_ids": dict(self.special_ids),
            "tokenizer_sha256": self.tokenizer_sha256,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": sum(shard.bytes for shard in self.shards),
            "shards": [dict(vars(shard)) for shard in self.shards],
        }

    def save(self, directory: str | Path) -> Path:
        """Write the index for `wids` readers, then the manifest itself, last."""
        shardlist = [{"url": s.name, "nsamples": s.documents, "filesize": s.bytes} for s in self.shards]
        wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": self.split, "shardlist": shardlist}
        write_json(Path(directory) / WIDS_NAME, wids)
        path = Path(directory) / MANIFEST_NAME
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest by its path or URL, or that of its directory, and check that it is whole.

        Raises:
            ManifestError: with what is wrong with it.
        """
        path = str(path)
        if not path.endswith(".json"):
            path = f"{path.rstrip('/')}/{MANIFEST_NAME}"
        try:
            value = json.loads(_read(path).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{path} is not JSON: {error}. Prepare the data again.") from error
        directory, _, name = path.rpartition("/")
        try:
            manifest = replace(_parse(value), location=directory or ("/" if path.startswith("/") else "."), name=name)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path} is damaged: {_reason(error)}. Prepare the data again.") from error
        counted = manifest.to_dict()
        for name in ("documents", "tokens", "bytes"):
            if value.get(name) != counted[name]:
                raise ManifestError(
                    f"{path} is damaged: it says {value.get(name)} {name}, its shards make {counted[name]}."
                )
        return manifest


def _reason(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _read(path: str) -> bytes:
    try:
        if "://" in path:
            return read_bytes(path)
        return Path(path).read_bytes()
    except (OSError, StoreError) as error:
        reason = error.reason if isinstance(error, StoreError) else error.strerror or error
        raise ManifestError(
            f"cannot read the manifest {path}: {reason}. Prepare the data with 'hope data prepare', "
            f"or name the directory that holds the {MANIFEST_NAME}."
        ) from error


def _parse(value: Any) -> Manifest:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
    if value["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"its dtype is {value['dtype']!r}, not '<u2' or '<u4'")
    specials = {name: _integer(value["special_ids"], name, minimum=-1) for name in ("unk", "bos", "eos", "pad")}
    vocab_size = _integer(value, "vocab_size", minimum=1)
    if not 0 <= specials["eos"] < vocab_size:
        raise ValueError(f"its end mark {specials['eos']} is outside the vocabulary of {vocab_size}")
    shards = tuple(_parse_shard(shard) for shard in value["shards"])
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("it names a shard twice")
    return Manifest(
        split=str(value["split"]),
        shards=shards,
        tokenizer_sha256=_matching(_SHA256, value["tokenizer_sha256"]),
        vocab_size=vocab_size,
        special_ids=specials,
        dtype=value["dtype"],
    )


def _parse_shard(value: dict[str, Any]) -> ShardInfo:
    unknown = set(value) - {field.name for field in fields(ShardInfo)}
    if unknown:
        raise ValueError(f"a shard has the unknown field {min(unknown)!r}")
    return ShardInfo(
        name=_matching(_SAFE_NAME, value["name"]),  # a plain file name: no path out of the directory
        bytes=_integer(value, "bytes"),
        documents=_integer(value, "documents", minimum=1),
        tokens=_integer(value, "tokens"),
        sha256=_matching(_SHA256, value["sha256"]),
        index_sha256=_matching(_SHA256, value["index_sha256"]),
    )


def _integer(value: Mapping[str, Any], name: str, minimum: int = 0) -> int:
    number = value[name]
    if not isinstance(number, int) or isinstance(number, bool) or number < minimum:
        raise ValueError(f"{name} is {number!r}, not a whole number of at least {minimum}")
    return number


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not of the form {pattern.pattern}")
    return text
