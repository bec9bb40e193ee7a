"""How much code is written more than once? Counts runs of six or more like lines that stand in two places.

    python tools/repeated_code.py                       # this checkout
    python tools/repeated_code.py --at 79a01a3 --json   # a commit, figures as JSON
    python tools/repeated_code.py --list shape          # and where they are

Read are all Python files that git tracks, but not tests. Left out of each: comments, docstrings, imports, blank lines, and
lines of punctuation alone. White space is folded. Three counts, of pairs of files (or one file with itself):

    same     the lines are the same to the letter
    alike    the lines are the same once variables, strings and numbers are replaced. What is called, accessed or passed by name
             stays: lines that do other things are not alike. Lines that do nothing are left out: heads of classes,
             fields, parameters, rows of tables
    shape    every name, string and number is replaced. Left out are only bare declarations: heads of classes, annotated
             fields, parameters. Rows of tables count, so any two lists of six values are a pair

A run in more than eight places is an idiom, such as `if __name__ == "__main__":`, and does not count.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import keyword
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

RUN_LINES = 6
TOO_COMMON = 8
KINDS = ("same", "alike", "shape")
WHITE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
)  # fmt: skip
# Triton kernels take pointers and strides one by one; the exported model may import nothing of this package.
APART = ("*/backends/triton/*", "*/huggingface/model/*")

Neighbours = tuple[str, tokenize.TokenInfo, str]
"""A token, and the strings before and after it."""
Place = tuple[str, int]
"""A file, and the index of a line among those of it that count."""


@dataclass(frozen=True)
class Line:
    """A line that counts."""

    number: int
    same: str
    alike: str | None
    """None if the line does nothing."""
    shape: str | None
    """None if the line only declares."""


def read_lines(source: str) -> list[Line]:
    """The lines of a file that count, in order."""
    left_out, declares = _roles(ast.parse(source))
    tokens: dict[int, list[tokenize.TokenInfo]] = defaultdict(list)
    for token in _tokens(source):
        if token.type not in WHITE:
            tokens[token.start[0]].append(token)
    lines = []
    for number, found in sorted(tokens.items()):
        if number in left_out or not any(
            token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING) for token in found
        ):
            continue
        around = list(_with_neighbours(found))
        idle = number in declares or all(map(_does_nothing, around))
        alike = None if idle else " ".join(map(_role, around))
        same = " ".join(token.string for token in found)
        shape = None if number in declares else " ".join(map(_shape, found))
        lines.append(Line(number, same, alike, shape))
    return lines


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """Tokens as Python 3.11 has them: an f-string is one string, which newer ones take apart."""
    starts, ends = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
    depth, first, lines = 0, None, source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == starts:
            depth, first = depth + 1, first or token
        if first is None:
            yield token
        if token.type == ends:
            depth -= 1
            if depth == 0 and first is not None:
                yield tokenize.TokenInfo(
                    tokenize.STRING, _between(lines, first.start, token.end), first.start, token.end, token.line
                )
                first = None


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The source from (line, column) to (line, column); lines count from 1."""
    (first, column), (last, stop) = start, end
    if first == last:
        return lines[first - 1][column:stop]
    return "".join([lines[first - 1][column:], *lines[first : last - 1], lines[last - 1][:stop]])


def _does_nothing(neighbours: Neighbours) -> bool:
    """Whether a line of such tokens only states values: a row of a table, an entry of a list, an argument handed on."""
    before, token, _ = neighbours
    if token.string == "(":
        return not before.isidentifier()  # no call
    if token.type == tokenize.NAME:
        return not keyword.iskeyword(token.string) or token.string in ("None", "True", "False")
    return token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in tuple(":,.[]{})")


def _with_neighbours(tokens: list[tokenize.TokenInfo]) -> Iterator[Neighbours]:
    strings = ["", *(token.string for token in tokens), ""]
    return zip(strings, tokens, strings[2:], strict=False)


def _role(neighbours: Neighbours) -> str:
    """A name that is called, accessed or passed by name; else its shape."""
    before, token, after = neighbours
    return token.string if token.type == tokenize.NAME and (before == "." or after in ("(", "=")) else _shape(token)


def _shape(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return "name"
    return {tokenize.STRING: "text", tokenize.NUMBER: "number"}.get(token.type, token.string)


def _roles(tree: ast.Module) -> tuple[set[int], set[int]]:
    """Numbers of the lines of imports and docstrings, and of those that only declare: heads of classes, fields, parameters."""
    left_out: set[int] = set()
    declares: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.ClassDef):
            declares.update(
                range(min((part.lineno for part in node.decorator_list), default=node.lineno), node.body[0].lineno)
            )
            for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
                declares.update(range(field.lineno, (field.end_lineno or field.lineno) + 1))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            declares.update(range(node.lineno, node.body[0].lineno))
    return left_out, declares


def _is_docstring(node: ast.AST) -> bool:
    """A string that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def count(files: Mapping[str, str], kind: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Pairs of files that share a run, each with the longest: its lines, and where it begins in either."""
    places: dict[str, list[tuple[str, int]]] = {}  # by file: what is compared, and the line's number
    for name, source in files.items():
        lines = ((getattr(line, kind), line.number) for line in read_lines(source))
        places[name] = [(text, number) for text, number in lines if text is not None]
    pairs: dict[tuple[str, str], tuple[int, int, int]] = {}
    for first, second in _alike(places):
        length = _length(places, first, second)
        names = first[0], second[0]
        if length > pairs.get(names, (0, 0, 0))[0]:
            pairs[names] = length, places[first[0]][first[1]][1], places[second[0]][second[1]][1]
    return pairs


def _alike(places: Mapping[str, list[tuple[str, int]]]) -> Iterator[tuple[Place, Place]]:
    """Two places at which the same six lines begin, and do not overlap."""
    windows: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    for name, lines in places.items():
        for start in range(len(lines) - RUN_LINES + 1):
            windows[tuple(text for text, _ in lines[start : start + RUN_LINES])].append((name, start))
    for found in windows.values():
        if len(found) <= TOO_COMMON:
            for first, second in itertools.combinations(found, 2):
                if first[0] != second[0] or second[1] - first[1] >= RUN_LINES:
                    yield first, second


def _length(places: Mapping[str, list[tuple[str, int]]], first: Place, second: Place) -> int:
    """Lines for which two places go on alike."""
    rest = zip(places[first[0]][first[1] :], places[second[0]][second[1] :], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], rest))


def files_of(commit: str | None, root: Path) -> dict[str, str]:
    """Python files outside tests: of a commit, or as they are in the checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "-r", "--name-only", commit) if commit else git("ls-files")
    chosen = [name for name in names.splitlines() if name.endswith(".py") and not name.startswith("tests/")]
    if commit:
        return {name: git("show", f"{commit}:{name}") for name in chosen}
    return {name: (root / name).read_text(encoding="utf-8") for name in chosen}


def apart(names: Iterable[str]) -> bool:
    """Whether a pair lies in code that cannot share."""
    return all(any(fnmatch(name, pattern) for pattern in APART) for name in names)


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", metavar="COMMIT", help="count at a commit (default: the checkout as it is)")
    parser.add_argument("--list", choices=KINDS, help="name the pairs of this count, longest run first")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    files = files_of(options.at, Path(__file__).resolve().parents[1])
    pairs = {kind: count(files, kind) for kind in KINDS}
    figures = {
        kind: {"pairs": len(found), "without_triton_and_export": sum(not apart(names) for names in found)}
        for kind, found in pairs.items()
    }
    if options.json:
        print(json.dumps({"commit": options.at, "files": len(files), **figures}, indent=1))
        return 0
    for kind, figure in figures.items():
        print(
            f"{kind:6} {figure['pairs']:4} pairs, {figure['without_triton_and_export']} of them apart from "
            "Triton kernels and the exported model"
        )
    if options.list:
        for (first, second), (length, here, there) in sorted(pairs[options.list].items(), key=lambda item: -item[1][0]):
            print(f"{length:4} lines  {first}:{here} ~ {second}:{there}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
