"""Text of this machine or of files the user names, as bytes."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.corpus import python_stdlib_documents
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.splits import dealt
from hope_megatron.suites.task import Batch, Draw, Source, Split

Documents = list[bytes]
_MIN_DOCUMENTS = 20  # to be dealt as they are
_SEPARATOR = b"\n\n"
MAX_BYTES = 8 << 20  # of one domain


@cache
def python_text() -> tuple[bytes, ...]:
    """The files of the standard library."""
    return tuple(document.data for document in python_stdlib_documents())


@cache
def docstrings() -> tuple[bytes, ...]:
    """The documentation strings of the standard library, one document per file."""
    found = []
    for data in python_text():
        try:
            tree = ast.parse(data)
        except (SyntaxError, ValueError):
            continue  # templates and files of other encodings: code that this Python does not read has no strings for us
        texts = [
            text
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (text := ast.get_docstring(node))
        ]
        if texts:
            found.append("\n\n".join(texts).encode())
    return tuple(found)


def code_without_docstrings() -> tuple[bytes, ...]:
    """The files of the standard library, lines of comments and documentation strings taken out."""
    return tuple(_bare(data) for data in python_text())


def _bare(data: bytes) -> bytes:
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return data
    lines = data.split(b"\n")
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines[first.lineno - 1 : first.end_lineno] = [b""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
    return b"\n".join(line for line in lines if line.strip() and not line.lstrip().startswith(b"#"))


def read_texts(path: Path, suffixes: tuple[str, ...] = ()) -> tuple[bytes, ...]:
    """A file, or the files under a directory in the order of their names, up to 8 MiB in all.

    Raises:
        SuiteError: if there is no text.
    """
    if not path.exists():
        raise SuiteError(f"no file or directory {path}; name text that is there")
    files: Iterable[Path] = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    documents, size = [], 0
    for file in files:
        if suffixes and file.suffix not in suffixes and file.name not in suffixes:
            continue
        data = file.read_bytes()[: MAX_BYTES - size]
        if data.strip() and b"\0" not in data:
            documents.append(data)
            size += len(data)
        if size >= MAX_BYTES:
            break
    if not documents:
        raise SuiteError(f"{path} holds no text")
    return tuple(documents)


def system_text() -> tuple[bytes, ...]:
    """Prose that is there without asking: licences and copyright notices under /usr/share/doc, else Python's own licence."""
    root = Path("/usr/share/doc")
    if root.is_dir() and any(root.glob("*/copyright")):
        return read_texts(root, ("copyright", "README", "README.Debian", ".txt"))
    return read_texts(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt")


def split_text(documents: tuple[bytes, ...], split: Split, seed: int) -> np.ndarray:
    """Bytes of a split's documents. Few documents are cut into blocks first, which are dealt like documents.

    Args:
        seed: which documents are held out.
    """
    pieces = documents if len(documents) >= _MIN_DOCUMENTS else _blocks(_SEPARATOR.join(documents))
    return np.frombuffer(_SEPARATOR.join(dealt(pieces, split, seed)), dtype=np.uint8)


def text_source(read: Callable[[], tuple[bytes, ...]], context: int) -> Source:
    """Windows of text, whose documents are divided among the splits by seed. Text is read when first drawn from."""

    def source(split: Split, seed: int) -> Draw:
        data: list[np.ndarray] = []

        def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
            if not data:
                data.append(split_text(read(), split, seed))
            return windows(data[0], context, size, rng)

        return draw

    return source


def _blocks(text: bytes) -> tuple[bytes, ...]:
    bounds = np.linspace(0, len(text), _MIN_DOCUMENTS + 1).astype(int)
    return tuple(text[a:b] for a, b in pairwise(bounds))


def windows(data: np.ndarray, context: int, size: int, rng: np.random.Generator) -> Batch:
    """Random windows [size, context] of bytes, and their next bytes.

    Raises:
        SuiteError: if there are fewer bytes than a window has.
    """
    if len(data) <= context + 1:
        raise SuiteError(f"{len(data)} bytes of text are less than one window of {context + 1}; give more text")
    starts = rng.integers(0, len(data) - context - 1, size)
    rows = np.stack([data[i : i + context + 1] for i in starts]).astype(np.int64)
    return Batch(rows[:, :-1], np.ascontiguousarray(rows[:, 1:]))
