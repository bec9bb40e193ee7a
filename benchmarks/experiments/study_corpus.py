"""The text of the scaling study: documentation and books from Debian packages, code from PyPI, as JSON lines.

    python benchmarks/experiments/study_corpus.py --out corpus                # english.jsonl, code.jsonl and a table
    python benchmarks/experiments/study_corpus.py --out corpus --mirror URL   # another Debian mirror

The packages, with versions, licences and SHA-256, are in study_corpus.yaml; a package with another digest is refused. Needs a
network and pip, 2 GB of disk and twenty minutes. Packages are kept in CACHE (`--cache`), so that they are fetched once.
A document is a file: HTML without its marks, navigation and scripts; text and Python sources as they are. Left out are files under
400 characters, and those that are not English by their commonest words (code: not ASCII).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

import yaml

LIST = Path(__file__).with_suffix(".yaml")
MIRROR = "https://deb.debian.org/debian"
MIN_CHARS = 400
MAX_CHARS = 400_000
COMMON = frozenset(
    re.findall(r"\w+", "the of and to a in is that for it as with be are this by an on or not from can which if will")
)
MIN_COMMON_SHARE = 0.15
"""English prose has about 0.35; lists of identifiers have next to nothing."""
BLOCKS = frozenset(
    re.findall(r"\w+", "p div br li ul ol dl dt dd tr table pre blockquote h1 h2 h3 h4 h5 h6 section article")
)
SKIPPED = frozenset(re.findall(r"\w+", "script style head nav header footer button select svg"))


class Text(HTMLParser):
    """What a reader sees of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self._skipped = max(0, self._skipped - 1)
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)

    def text(self) -> str:
        """Lines without blanks at their ends, at most one empty line between two."""
        lines = (re.sub(r"[ \t]+", " ", line).rstrip() for line in "".join(self.parts).splitlines())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch(row: Mapping[str, str], kind: str, cache: Path, mirror: str) -> Path:
    """The package of a row, from the cache or the network; refused if its digest is another.

    Raises:
        SystemExit: naming the package, if it cannot be had or is not the one of the list.
    """
    place = cache / f"{row['package']}-{row['version']}"
    place.mkdir(parents=True, exist_ok=True)
    if not any(place.iterdir()):
        (_fetch_debian if kind == "english" else _fetch_wheel)(row, place, mirror)
    (file,) = place.iterdir()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if row.get("sha256", digest) != digest:
        raise SystemExit(
            f"{file} has SHA-256 {digest}, {LIST.name} has {row['sha256']}: remove it, or choose another --mirror"
        )
    return file


def _fetch_debian(row: Mapping[str, str], place: Path, mirror: str) -> None:
    name = f"{row['package']}_{row['version']}_all.deb"
    url = f"{mirror}/pool/main/{row['pool']}/{urllib.parse.quote(name)}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except OSError as error:
        raise SystemExit(
            f"{url}: {error}; try --mirror http://snapshot.debian.org/archive/debian/20260101T000000Z"
        ) from None
    (place / (name + ".part")).write_bytes(data)
    (place / (name + ".part")).rename(place / name)


def _fetch_wheel(row: Mapping[str, str], place: Path, mirror: str) -> None:
    platforms = [f"--platform={name}" for name in ("any", "manylinux_2_17_x86_64", "manylinux2014_x86_64")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.11",
    ]
    done = subprocess.run([*command, *platforms, f"--dest={place}", f"{row['package']}=={row['version']}"], check=False)
    if done.returncode:
        raise SystemExit(f"pip cannot download {row['package']} {row['version']}")


def files_of(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a .deb or a wheel, sorted by name."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in sorted(archive.namelist()):
                yield name, archive.read(name)
        return
    with tarfile.open(fileobj=io.BytesIO(_data_member(package.read_bytes()))) as archive:
        for member in sorted((part for part in archive if part.isfile()), key=lambda part: part.name):
            content = archive.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def _data_member(deb: bytes) -> bytes:
    """The tar with the files: a .deb is an `ar` archive, whose members have headers of 60 bytes and begin at even places."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].strip(), int(deb[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SystemExit("not a Debian package: no data.tar")


def documents(row: Mapping[str, str], kind: str, package: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of a package's documents."""
    only, skip = re.compile(row.get("only", "")), re.compile(row.get("skip", r"(?!)"))
    for name, content in files_of(package):
        if not only.search(name) or skip.search(name):
            continue
        if name.endswith((".gz", ".dz")):
            name, content = name[:-3], gzip.decompress(content)
        text = _read(name, content, "code" if kind == "code" else row["kind"])
        for start in range(0, len(text), MAX_CHARS):
            part = text[start : start + MAX_CHARS]
            if len(part) >= MIN_CHARS and (part.isascii() if kind == "code" else _is_english(part)):
                yield f"{row['package']}/{name}", part


def _read(name: str, content: bytes, kind: str) -> str:
    wanted = {"code": (".py",), "html": (".html", ".htm", ".xhtml"), "text": (".txt", ".dict", ".text", "")}[kind]
    if Path(name).suffix not in wanted:
        return ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    if kind != "html":
        return text
    page = Text()
    page.feed(text)
    return page.text()


def _is_english(text: str) -> bool:
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in COMMON for word in words) >= MIN_COMMON_SHARE * max(1, len(words))


def main() -> None:
    """Collect both kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/hope_megatron/study_corpus")
    parser.add_argument("--mirror", default=MIRROR, help=f"Debian mirror ({MIRROR})")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    print("| package | version | licence | documents | MB |\n|---|---|---|---|---|")
    for kind, packages in rows.items():
        total, digest = 0, hashlib.sha256()
        with open(options.out / f"{kind}.jsonl", "w", encoding="utf-8") as out:
            for row in packages:
                package = fetch(row, kind, options.cache, options.mirror)
                count = size = 0
                for name, text in documents(row, kind, package):
                    line = json.dumps({"source": name, "text": text}) + "\n"
                    digest.update(line.encode())
                    out.write(line)
                    count, size = count + 1, size + len(text)
                total += size
                print(
                    f"| {row['package']} | {row['version']} | {row['licence']} | {count:,} | {size / 1e6:.1f} |",
                    flush=True,
                )
        print(
            f"| **{kind}** | | | | **{total / 1e6:.1f}** |\n{kind}.jsonl: SHA-256 {digest.hexdigest()}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
