"""The structure of a shard, checked in bulk: pairs of plain members as our writer makes them, and nothing else.

Every header is compared, byte for byte, with the one that `plain_header` writes. So a shard with a path, a link, a device,
an extended header, a member of another kind, a gap, or data behind its end is refused, whatever its index says.
"""

from __future__ import annotations

import mmap
import tarfile

import numpy as np

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
_PIECE = 4096  # documents checked at a time: 4 MiB of headers
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a header (POSIX ustar)
_OCTAL = 8 ** np.arange(11, dtype=np.int64)[::-1]
_KEY_BYTES = np.zeros(256, dtype=bool)
_KEY_BYTES[np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)] = True


def plain_header(name: str, size: int) -> bytes:
    """The header of a tar member, which depends on nothing but its name and size."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = np.frombuffer(plain_header("", 0), dtype=np.uint8)
_FIXED = np.ones(BLOCK, dtype=bool)
for _field in (_NAME, _SIZE, _CHECKSUM):
    _FIXED[_field] = False


def padded(sizes: np.ndarray) -> np.ndarray:
    """Sizes rounded up to whole blocks."""
    return sizes + (-sizes % BLOCK)


def find_fault(buffer: mmap.mmap, offsets: np.ndarray, sizes: np.ndarray, extension: str) -> str | None:
    """What is wrong with a shard, or None.

    Args:
        buffer: the tar.
        offsets: int64 [num_documents], where the tokens of each document begin; in order and inside the buffer.
        sizes: int64 [num_documents], bytes of the tokens of each document.
        extension: of the members that hold tokens.
    """
    raw = np.frombuffer(buffer, dtype=np.uint8)
    end = 0
    for first in range(0, len(offsets), _PIECE):
        piece = slice(first, first + _PIECE)
        token_headers, json_headers = offsets[piece] - BLOCK, offsets[piece] + padded(sizes[piece])
        if json_headers[-1] + BLOCK > len(raw):
            return f"ends before the provenance of document {first + len(json_headers) - 1}"
        tokens, provenance = _headers(raw, token_headers), _headers(raw, json_headers)
        json_sizes = _numbers(provenance[:, _SIZE])
        ends = json_headers + BLOCK + padded(json_sizes)
        checks = {
            "is not where its index says": token_headers == np.concatenate([[end], ends[:-1]]),
            "is no plain member of the tar": _is_plain(tokens, extension),
            "has another size than its index says": _numbers(tokens[:, _SIZE]) == sizes[piece],
            "has no provenance beside it": _is_plain(provenance, "json") & _same_keys(tokens, provenance),
        }
        for fault, holds in checks.items():
            if not holds.all():
                return f"is not one of ours: document {first + int(holds.argmin())} {fault}"
        end = int(ends[-1])
    if len(raw) != end + 2 * BLOCK or raw[end:].any():
        return f"is not one of ours: it holds more than its {len(offsets)} documents"
    return None


def _headers(raw: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The blocks at some places: uint8 [len(starts), 512]."""
    return raw[starts[:, None] + np.arange(BLOCK)]


def _numbers(field: np.ndarray) -> np.ndarray:
    """Octal numbers of 11 digits and a NUL: int64, -1 where there is none."""
    digits = field[:, :11].astype(np.int64) - ord("0")
    valid = ((digits >= 0) & (digits < 8)).all(axis=1) & (field[:, 11] == 0)
    return np.where(valid, digits @ _OCTAL, -1)


def _is_plain(headers: np.ndarray, extension: str) -> np.ndarray:
    """Whether headers are those of regular files named KEY.extension, as we write them: bool [num_headers]."""
    names = headers[:, _NAME]
    dots = (names == ord(".")).argmax(axis=1)
    is_key = np.arange(names.shape[1]) < dots[:, None]
    suffix = np.frombuffer(f".{extension}".encode().ljust(100, b"\0"), dtype=np.uint8)
    behind = suffix[np.clip(np.arange(names.shape[1]) - dots[:, None], 0, None)]
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    digits = headers[:, 148:154].astype(np.int64) - ord("0")
    plain: np.ndarray = (
        (headers[:, _FIXED] == _TEMPLATE[_FIXED]).all(axis=1)
        & (dots > 0)
        & np.where(is_key, _KEY_BYTES[names], names == behind).all(axis=1)
        & ((digits >= 0) & (digits < 8)).all(axis=1)
        & (digits @ _OCTAL[-6:] == sums)
        & (headers[:, 154] == 0)
        & (headers[:, 155] == ord(" "))
    )
    return plain


def _same_keys(headers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether the names of pairs of headers agree up to the first dot: bool [num_headers]."""
    names, other_names = headers[:, _NAME], others[:, _NAME]
    dots = (names == ord(".")).argmax(axis=1)
    same: np.ndarray = ((names == other_names) | (np.arange(names.shape[1]) > dots[:, None])).all(axis=1)
    return same
