"""Compiles scan.cpp for the processor at hand, once per machine and version, and loads it.

The library lies in the user's cache, named by a digest of everything it depends on: sources, compiler, command and processor.
Ranks that need it at the same time wait for the one that builds it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  the library resolves OpenMP to the runtime that PyTorch brings along

from hope_megatron.ops.memory.backends.cache import cache_folder

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_SOURCES = ("scan.cpp", "backward.h", "chunk.h", "products.h", "vector.h")


class NoKernel(RuntimeError):
    """Why there is no kernel on this machine."""


def library() -> ctypes.CDLL:
    """The compiled kernel, loaded once per process.

    Raises:
        NoKernel: it cannot be built; the reason stays, and a warning said it once.
    """
    found = _library()
    if isinstance(found, NoKernel):
        raise found
    return found


@functools.cache
def _library() -> ctypes.CDLL | NoKernel:
    try:
        return load()
    except NoKernel as reason:
        log.warning("memories run through PyTorch's operators, several times slower on a CPU: %s", reason)
        return reason


def load() -> ctypes.CDLL:
    """Build the kernel if it is not there yet, and load it.

    Raises:
        NoKernel: there is no C++ compiler, or it failed.
    """
    compiler = _compiler()
    path = cache_folder() / f"memory-{_digest(compiler)}.so"
    try:
        if not _is_whole(path):
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernel(f"{path} cannot be written or loaded: {error}") from error


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise NoKernel("no C++ compiler; install one (Debian, Ubuntu: apt-get install g++) or name it in CXX")


def _flags() -> list[str]:
    here = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    more = os.environ.get("CXXFLAGS", "").split()
    return ["-std=c++17", "-O3", here, "-fno-math-errno", "-fopenmp", "-fPIC", *more]


def _digest(compiler: str) -> str:
    found = hashlib.sha256()
    for source in _SOURCES:
        found.update((_HERE / source).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (compiler, version, _flags(), _processor()):
        found.update(repr(part).encode())
    return found.hexdigest()[:16]


def _processor() -> list[str]:
    """What -march=native looks at: home directories are shared between nodes of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})


def _build(compiler: str, path: Path) -> None:
    """Compile to a file beside `path`, then rename: a library that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(path):
            return
        if path.exists():
            log.warning("%s is damaged: the memory kernel is compiled again", path)
        log.info("compiling the memory kernel for this processor, once")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = Path(folder) / "scan.o", Path(folder) / path.name
            _run([compiler, *_flags(), "-c", str(_HERE / "scan.cpp"), "-o", str(compiled)])
            # Without -fopenmp: a second OpenMP runtime beside PyTorch's would mean a second set of spinning threads.
            _run([compiler, "-shared", str(compiled), "-o", str(linked)])
            digest = hashlib.sha256(linked.read_bytes()).hexdigest()
            linked.replace(path)
            written = Path(folder) / "sha256"
            written.write_text(digest)
            written.replace(_digest_file(path))


def _is_whole(path: Path) -> bool:
    """Whether the library is there, with the bytes that were linked: loading damaged code ends the process, or worse."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _digest_file(path).read_text()
    except (OSError, ValueError):
        return False


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoKernel(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
