"""Which kind of data a file's name promises, and under which compression."""

from __future__ import annotations

import os
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["text", "json_lines", "json", "parquet", "arrow", "tar"]

KINDS: dict[str, Kind] = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text",
    ".jsonl": "json_lines", ".ndjson": "json_lines", ".json": "json", ".parquet": "parquet",
    ".arrow": "arrow", ".tar": "tar",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lzma")
TARS = {".tgz": ".gz", ".tzst": ".zst", ".tbz2": ".bz2", ".txz": ".xz"}  # .tar under a compression, in short
REFUSED = (".zip", ".7z", ".rar", ".lz4", ".lz", ".lzo", ".br", ".sz", ".snappy", ".z")
"""Archives and compressions that are not read. As text they would be nonsense, so they are refused by name."""
FOREIGN = (".csv", ".tsv", ".ipynb", ".avro", ".orc", ".feather", ".pdf", ".docx", ".odt", ".epub", ".xls", ".xlsx")
"""Tables, notebooks and documents of other programs. As text each would be one document: its own source, not what it says."""

KNOWN = f"{' '.join(KINDS)}, also with {' '.join(COMPRESSIONS)}"


def suffix_of(path: str) -> str:
    """The last suffix of a path or URL in lower case, without a query: ``.gz`` for ``http://host/a.JSONL.GZ?x=1``."""
    name = urlsplit(path).path if path.startswith(("http://", "https://")) else path
    return os.path.splitext(name.lower())[1]


def split_compression(path: str) -> tuple[str, str]:
    """The suffix under the compression, and the compression: ``(".jsonl", ".gz")`` for ``a.jsonl.gz``.

    A bare ``a.gz`` holds text. The compression is "" if there is none.
    """
    suffix = suffix_of(path)
    if suffix in TARS:
        return ".tar", TARS[suffix]
    if suffix not in COMPRESSIONS:
        return suffix, ""
    name = urlsplit(path).path if path.startswith(("http://", "https://")) else path
    return suffix_of(name[: -len(suffix)]) or ".txt", suffix


def refusal(path: str) -> tuple[str, str] | None:
    """(suffix, what to do) of a path that is never taken as text; None for any other."""
    for suffix in (suffix_of(path), split_compression(path)[0]):
        if suffix in REFUSED:
            return suffix, "Unpack it"
        if suffix in FOREIGN:
            return suffix, "Convert it, for example to JSON lines"
    return None


def kind_of(path: str) -> Kind | None:
    """The kind of data that a path promises, None for any other kind."""
    return KINDS.get(split_compression(path)[0])
