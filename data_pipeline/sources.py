"""From what a user names to files: sources expand to sorted files, and what is left out is counted by reason.

A *source* is a file, a directory, a glob, a URL, or ``python-stdlib``. Only regular files are read, so nothing here can
hang. A link inside a source is followed while it stays inside. One that leads out is followed only on request, because
a downloaded directory must not be able to reach into the rest of the machine.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import SourceError
from data_pipeline.formats import KNOWN, kind_of, refusal, split_compression
from data_pipeline.remote import list_remote
from data_pipeline.source_files import LeftOut, SourceFile, refuse_unreadable_kind

PYTHON_STDLIB = "python-stdlib"
# Parts of the standard library's directory that are not for reading: installed packages, tests, copies, code tables.
STDLIB_EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
    "__pycache__",
}  # fmt: skip
LINK_OUT = "link out of the source"
SAME_DIRECTORY = "link to a directory that is read anyway"
SAME_FILE = "link to a file that is read anyway"


@dataclass
class Sources:
    """The files to read, in order, and those that are left out."""

    files: list[SourceFile]
    left_out: LeftOut


def find_sources(sources: Sequence[str | Path], *, follow_links: bool = False) -> Sources:
    """All files of the sources, in the order of the sources and sorted within each; a file named twice counts once.

    Args:
        sources: see above.
        follow_links: read links that lead out of a directory or pattern too. Loops are cut in any case.

    Raises:
        SourceError: a source does not exist, holds nothing to read, or is of a kind that cannot be read.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    files: dict[str, SourceFile] = {}
    left_out = LeftOut()
    for source in map(str, sources):
        for file in _expand_one(source, follow_links, left_out):
            files.setdefault(file.path, file)
    if not files:
        raise SourceError("no source of text was given: name files, directories, globs or URLs, or 'python-stdlib'.")
    return Sources(list(files.values()), left_out)


def expand_sources(sources: Sequence[str | Path], *, follow_links: bool = False) -> list[SourceFile]:
    """The files of `find_sources` alone."""
    return find_sources(sources, follow_links=follow_links).files


def _expand_one(source: str, follow_links: bool, left_out: LeftOut) -> Iterable[SourceFile]:
    if source == PYTHON_STDLIB:
        return _stdlib_files()
    if "://" in source:
        return list_remote(source, left_out)
    if os.path.isdir(source):
        found = _Finder(source, follow_links, left_out)
        found.walk()
        empty = f"the directory {source} holds no file that can be read ({KNOWN})."
    elif os.path.lexists(source):
        return [_named_file(source)]
    elif glob.has_magic(source):
        found = _Finder(_base(source), follow_links, left_out)
        for path in sorted(glob.glob(source, recursive=True)):
            found.matched(path)
        empty = f"the pattern {source} matches no file. Quote it, and check the path."
    else:
        raise SourceError(f"the source {source} does not exist (working directory: {os.getcwd()}).")
    if not (paths := found.paths()):
        raise SourceError(empty + _hint(found.left_out))
    return [_local_file(path) for path in paths]


def _hint(left_out: LeftOut) -> str:
    remedy = " --follow-links reads the links." if LINK_OUT in left_out.counts else ""
    return f" Left out: {left_out}.{remedy}" if left_out else ""


def _named_file(path: str) -> SourceFile:
    """A file that the user named itself: what cannot be read is refused, not left out."""
    mode = _mode(path)
    if isinstance(mode, str):
        raise SourceError(f"{path} is a {mode}: mend the link, or leave it out.")
    if special := _special(mode):
        raise SourceError(f"{path} is a {special}, not a regular file: write its content to a file first.")
    refuse_unreadable_kind(path)
    return _local_file(path)


def _mode(path: str) -> int | str:
    """The mode of what a path leads to, or what is wrong with the link."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "circular link"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return "broken link"
        raise _unreadable(path, error) from error


def _special(mode: int) -> str:
    """What a path is that is neither a file nor a directory, in words; "" for those two."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def _unreadable(path: str | os.PathLike[str], error: OSError) -> SourceError:
    if isinstance(error, PermissionError):
        return SourceError(f"{path} may not be read: change its permissions or leave it out.")
    return SourceError(f"{path} cannot be read: {error.strerror}.")


def _describes_arrow(path: str) -> bool:
    """Whether a JSON file is what `datasets.save_to_disk` writes beside its Arrow files."""
    directory, name = os.path.split(path)
    if name == "dataset_dict.json":
        return True
    return name in ("dataset_info.json", "state.json") and bool(glob.glob(f"{glob.escape(directory)}/*.arrow"))


def _base(pattern: str) -> str:
    """The directory of a pattern that no wildcard belongs to."""
    base = pattern
    while glob.has_magic(base):
        base = os.path.dirname(base)
    return base or "."


class _Finder:
    """The files below one directory, links resolved."""

    def __init__(self, root: str, follow_links: bool, total: LeftOut) -> None:
        self.files: dict[str, str] = {}  # path -> real path
        self.left_out = LeftOut()  # of this source, for its messages
        self._root, self._real_root, self._follow, self._total = root, os.path.realpath(root), follow_links, total
        self._links: dict[str, str] = {}

    def walk(self) -> None:
        """Take every readable file of the directory, at any depth."""
        waiting = [self._root]
        seen = {self._real_root}
        while waiting:
            directory = waiting.pop()
            real_directory = os.path.realpath(directory)
            for entry in _entries(directory):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_symlink():
                    self._take_known(
                        entry.path, os.path.join(real_directory, entry.name), self.files, entry.stat().st_mode
                    )
                elif (target := self._follow_link(entry.path)) is not None:
                    mode, real = target
                    if not stat.S_ISDIR(mode):
                        self._take_known(entry.path, real, self._links, mode)
                    elif self._is_inside(real) or real in seen:
                        self._leave_out(SAME_DIRECTORY, entry.path)
                    else:
                        seen.add(real)
                        waiting.append(entry.path)

    def _take_known(self, path: str, real: str, files: dict[str, str], mode: int) -> None:
        if special := _special(mode):
            self._leave_out(special, path)
        elif _describes_arrow(path):
            self._leave_out("description of a data set", path)
        elif kind_of(path) is None:
            self._leave_out(f"kind {split_compression(path)[0] or 'without suffix'}", path)
        else:
            files[path] = real

    def matched(self, path: str) -> None:
        """Take a path that a pattern matched: of any kind that might be text."""
        if (target := self._follow_link(path)) is None:
            return
        mode, real = target
        if special := _special(mode):
            self._leave_out(special, path)
        elif stat.S_ISDIR(mode):
            self._leave_out("directory", path)
        elif refused := refusal(path):
            self._leave_out(f"kind {refused[0]}", path)
        else:
            (self._links if os.path.islink(path) else self.files)[path] = real

    def paths(self) -> list[str]:
        """All files taken, sorted. Links come last: what is there under its own name is not read a second time."""
        known = set(self.files.values())
        for path, real in sorted(self._links.items()):
            if real in known:
                self._leave_out(SAME_FILE, path)
            else:
                known.add(real)
                self.files[path] = real
        self._links = {}
        return sorted(self.files)

    def _follow_link(self, path: str) -> tuple[int, str] | None:
        """Mode and path of what a path leads to; None if it is left out."""
        mode, real = _mode(path), os.path.realpath(path)
        if isinstance(mode, str):
            self._leave_out(mode, path)
        elif not self._follow and not self._is_inside(real):
            self._leave_out(LINK_OUT, path)
        else:
            return mode, real
        return None

    def _is_inside(self, real: str) -> bool:
        return os.path.commonpath([real, self._real_root]) == self._real_root

    def _leave_out(self, reason: str, path: str) -> None:
        name = os.path.relpath(path, self._root)
        self.left_out.add(reason, name)
        self._total.add(reason, name)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(directory, error) from error


def _local_file(path: str, name: str | None = None) -> SourceFile:
    if not os.access(path, os.R_OK):
        raise SourceError(f"the file {path} may not be read: change its permissions or leave it out.")
    status = os.stat(path)
    return SourceFile(path, name or path, status.st_size, str(status.st_mtime_ns))


def _stdlib_files() -> Iterator[SourceFile]:
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
    yield from sorted(files, key=lambda file: file.name)
