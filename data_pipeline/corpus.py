"""Documents out of text sources, one at a time and in a fixed order.

A *source* is what a user names: a file, a directory, a glob, a URL, or ``python-stdlib``. It expands to a sorted
list of `SourceFile`, and each file yields `Document` objects. A document that cannot be used is yielded as well, with
the reason in ``problem``: whoever counts documents sees every one of them.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from data_pipeline.errors import SourceError, require

log = logging.getLogger(__name__)

PYTHON_STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# Parts of the standard library's directory that are not for reading: installed packages, tests, copies, code tables.
STDLIB_EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
    "__pycache__",
}  # fmt: skip

TextUnit = Literal["file", "line", "chunk"]


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    text_field: str = "text"  # the field of a JSON line, or the column of a parquet file, that holds the text
    text_unit: TextUnit = "file"  # what one document of a plain text file is
    chunk_bytes: int = 1 << 16  # text_unit "chunk": cut at the first line end at or after this many bytes
    max_document_bytes: int = 1 << 24  # longer documents are rejected without being held in memory


@dataclass(frozen=True)
class SourceFile:
    """One input file. ``name`` is what provenance records; ``size`` is in bytes, None when the store does not say."""

    path: str
    name: str
    size: int | None = None
    modified: str = ""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass(frozen=True)
class Document:
    """A document as read: bytes not yet decoded, or the problem that kept it from being read."""

    source: str  # name of the source file
    position: int  # number of the document in that file, from 0
    data: bytes
    encoding: Literal["text", "json"] = "text"
    problem: str | None = None


class Rejected(Exception):
    """A document that cannot be used. The message is the reason under which it is counted."""


def document_text(document: Document, text_field: str = "text") -> str:
    """Decode a document, or raise `Rejected` with the reason."""
    if document.problem is not None:
        raise Rejected(document.problem)
    try:
        if document.encoding == "text":
            return document.data.decode("utf-8")
        text = _json_field(document.data, text_field)
        text.encode("utf-8")  # JSON escapes can spell lone surrogates, which are not text
        return text
    except UnicodeError:
        raise Rejected("bad_utf8") from None


def _json_field(line: bytes, field: str) -> str:
    if not line.strip():
        raise Rejected("empty")
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeError:
        raise
    except (ValueError, RecursionError):
        raise Rejected("bad_json") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise Rejected("missing_field")
    return text


# ---- from what the user names to files ---------------------------------------------------------------------------


def expand_sources(sources: Sequence[str | Path]) -> list[SourceFile]:
    """All files of the sources, in the order of the sources and sorted within each; a file named twice counts once."""
    if isinstance(sources, (str, Path)):
        sources = [sources]
    files: dict[str, SourceFile] = {}
    for source in map(str, sources):
        for file in _expand_one(source):
            files.setdefault(file.path, file)
    if not files:
        raise SourceError("no source of text was given: name files, directories, globs or URLs, or 'python-stdlib'.")
    return list(files.values())


def _expand_one(source: str) -> list[SourceFile]:
    if source == PYTHON_STDLIB:
        return _stdlib_files()
    if "://" in source:
        return _remote_files(source)
    if os.path.isdir(source):
        walk = os.walk(
            source, onerror=_refuse_directory
        )  # without it, walk leaves out what it cannot read and says nothing
        paths = sorted(os.path.join(root, name) for root, _, names in walk for name in names)
        paths = [path for path in paths if _is_known(path)]
        if not paths:
            known = " ".join(TEXT_SUFFIXES + JSON_SUFFIXES + (".parquet",))
            raise SourceError(
                f"the directory {source} holds no file that can be read ({known}, also with .gz or .zst)."
            )
    elif os.path.exists(source):
        paths = [source]
    elif glob.has_magic(source):
        paths = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if not paths:
            raise SourceError(f"the pattern {source} matches no file. Quote it, and check the path.")
    else:
        raise SourceError(f"the source {source} does not exist (working directory: {os.getcwd()}).")
    return [_local_file(path) for path in paths]


def _is_known(path: str) -> bool:
    return _bare_suffix(path) in TEXT_SUFFIXES + JSON_SUFFIXES + (".parquet",)


def _bare_suffix(path: str) -> str:
    """The suffix under the compression: ``.jsonl`` for ``a.jsonl.gz``. A bare ``a.gz`` holds text."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSED_SUFFIXES:
        return os.path.splitext(stem)[1] or ".txt"
    return suffix


def _refuse_directory(error: OSError) -> None:
    raise SourceError(
        f"the directory {error.filename} may not be read: change its permissions or name another one."
    ) from error


def _local_file(path: str, name: str | None = None) -> SourceFile:
    if not os.access(path, os.R_OK):
        raise SourceError(f"the file {path} may not be read: change its permissions or leave it out.")
    status = os.stat(path)
    return SourceFile(path, name or path, status.st_size, str(status.st_mtime_ns))


def _remote_files(url: str) -> list[SourceFile]:
    fsspec = require("fsspec", purpose=f"reading {url}", install="fsspec")
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        if glob.has_magic(root):
            found = sorted(filesystem.glob(root))
        else:
            found = sorted(filesystem.find(root)) if filesystem.isdir(root) else [root]
        infos = [(filesystem.unstrip_protocol(path), filesystem.info(path)) for path in found]
    except ImportError as error:
        raise SourceError(f"{url} needs another package: {error}.") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot reach {url}: {error}.") from error
    if not infos:
        raise SourceError(f"the pattern {url} matches no object.")
    return [
        SourceFile(path, path, info.get("size"), str(info.get("ETag") or info.get("mtime") or ""))
        for path, info in infos
    ]


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, children, names in os.walk(root):
        children[:] = [child for child in children if child not in STDLIB_EXCLUDED]
        for path in (Path(directory, name) for name in names if name.endswith(".py")):
            # _sysconfigdata describes one machine's compiler, not the language
            if not path.name.startswith("_sysconfigdata"):
                files.append(_local_file(str(path), f"{PYTHON_STDLIB}/{path.relative_to(root).as_posix()}"))
    if not files:
        raise SourceError(f"the Python standard library has no sources under {root}: name a text source of your own.")
    return sorted(files, key=lambda file: file.name)


# ---- from files to documents ---------------------------------------------------------------------------------------


class DamagedStream(Exception):
    """Compressed data that cannot be decompressed."""


_DAMAGE = (DamagedStream, gzip.BadGzipFile, EOFError, zlib.error, ValueError)  # pyarrow's errors are ValueErrors


def read_documents(file: SourceFile, options: ReadOptions | None = None) -> Iterator[Document]:
    """The documents of one file, in order. A file that breaks off ends with one ``unreadable`` document."""
    options = options or ReadOptions()
    position = 0
    try:
        for data, encoding, problem in _read(file, options):
            yield Document(file.name, position, data, encoding, problem)
            position += 1
    except SourceError:
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGE):
            if file.is_remote:  # the store failed, not the file: counting its rest as unreadable would lose documents
                raise SourceError(f"reading {file.path} broke off: {error!r}. Run the same command again.") from error
            if not isinstance(error, OSError):
                raise
        log.warning("%s cannot be read beyond document %d: %s", file.path, position, error)
        yield Document(file.name, position, b"", problem="unreadable")


_Item = tuple[bytes, Literal["text", "json"], "str | None"]


def _read(file: SourceFile, options: ReadOptions) -> Iterator[_Item]:
    suffix = _bare_suffix(file.path)
    with ExitStack() as stack:
        stream = _open(file, stack)
        if suffix == ".parquet":
            yield from _read_parquet(stream, file, options)
        elif suffix in JSON_SUFFIXES:
            yield from _read_lines(stream, options, "json")
        elif options.text_unit == "line":
            yield from _read_lines(stream, options, "text")
        elif options.text_unit == "chunk":
            yield from _read_chunks(stream, options)
        else:
            data = stream.read(options.max_document_bytes + 1)
            yield _checked(data, "text", len(data) > options.max_document_bytes)


def _checked(data: bytes, encoding: Literal["text", "json"], too_long: bool) -> _Item:
    return (b"", encoding, "too_long") if too_long else (data, encoding, None)


def _open(file: SourceFile, stack: ExitStack) -> IO[bytes]:
    stream: IO[bytes]
    if file.is_remote:
        fsspec = require("fsspec", purpose=f"reading {file.path}", install="fsspec")
        stream = stack.enter_context(fsspec.open(file.path, "rb"))
    else:
        stream = open(file.path, "rb")  # noqa: SIM115 - the stack closes it
        stack.callback(stream.close)
    if file.path.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if file.path.endswith(".zst"):
        return io.BufferedReader(_open_zstd(stream, file.path), 1 << 20)
    return stream


def _open_zstd(stream: IO[bytes], path: str) -> io.RawIOBase:
    zstandard = require("zstandard", purpose=f"reading {path}", install="zstandard")

    class Decompressed(io.RawIOBase):
        """A raw stream, so that it can be buffered and read by lines, with an error known to the rest of us."""

        def __init__(self) -> None:
            self._reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self._reader.readinto(buffer)
            except zstandard.ZstdError as error:
                raise DamagedStream(f"not a valid zstd stream: {error}") from error

    return Decompressed()


def _read_lines(stream: IO[bytes], options: ReadOptions, encoding: Literal["text", "json"]) -> Iterator[_Item]:
    longest = options.max_document_bytes + 2  # with its line end
    while line := stream.readline(longest):
        too_long = len(line) == longest and not line.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield _checked(line, encoding, too_long or len(line) > options.max_document_bytes)


def _read_chunks(stream: IO[bytes], options: ReadOptions) -> Iterator[_Item]:
    """Consecutive pieces of a text, cut at line ends; joined they are the file again."""
    limit = max(options.max_document_bytes, options.chunk_bytes + 1)
    while data := stream.read(options.chunk_bytes):
        if not data.endswith(b"\n"):
            data += stream.readline(limit - len(data))
        too_long = len(data) == limit and not data.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        yield _checked(data, "text", too_long)


def _skip_line(stream: IO[bytes]) -> None:
    """Pass over the rest of a line without holding it."""
    while (piece := stream.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


def _read_parquet(stream: IO[bytes], file: SourceFile, options: ReadOptions) -> Iterator[_Item]:
    parquet = require("pyarrow.parquet", purpose=f"reading {file.path}", install="pyarrow")
    table = parquet.ParquetFile(stream)
    if options.text_field not in table.schema_arrow.names:
        raise SourceError(
            f"{file.path} has no column '{options.text_field}', only {', '.join(table.schema_arrow.names)}. "
            f"Name the one that holds the text with --text-field."
        )
    for batch in table.iter_batches(batch_size=256, columns=[options.text_field]):
        for value in batch.column(0):
            text = value.as_py()
            if text is None:
                yield b"", "text", "missing_field"
            elif isinstance(text, (str, bytes)):
                data = text.encode("utf-8") if isinstance(text, str) else text
                yield _checked(data, "text", len(data) > options.max_document_bytes)
            else:
                raise SourceError(f"column '{options.text_field}' of {file.path} holds {value.type}, not text.")


# ---- conveniences --------------------------------------------------------------------------------------------------


def iterate_documents(sources: Sequence[str | Path], options: ReadOptions | None = None) -> Iterator[Document]:
    """Every document of the sources, usable or not, in order."""
    for file in expand_sources(sources):
        yield from read_documents(file, options)


def iterate_texts(sources: Sequence[str | Path], options: ReadOptions | None = None) -> Iterator[str]:
    """The texts of all documents that can be decoded, in order; what a tokenizer is trained on."""
    options = options or ReadOptions()
    return decode_documents(iterate_documents(sources, options), options.text_field)


def decode_documents(documents: Iterable[Document], text_field: str = "text") -> Iterator[str]:
    """The texts of those documents that can be decoded."""
    for document in documents:
        try:
            yield document_text(document, text_field)
        except Rejected as reason:
            log.debug("%s document %d is passed over: %s", document.source, document.position, reason)


def python_stdlib_documents() -> Iterator[Document]:
    """The Python standard library's own sources, one document per module, sorted by path.

    Text that every machine with Python has; about 11 MB. Tests, vendored packages and generated files are left out.
    """
    return iterate_documents([PYTHON_STDLIB])
