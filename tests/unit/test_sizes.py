"""How large things may get: files that are read in one sitting, functions that are seen at once, code that stands once."""

from __future__ import annotations

import ast
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hope_megatron", "data_pipeline", "launch", "benchmarks", "examples", "tools")


def sources() -> dict[str, str]:
    names = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names.splitlines() if name.endswith(".py")}


def test_files_are_short():
    lines = {name: source.count("\n") for name, source in sources().items()}
    assert len(lines) > 300
    assert statistics.median(lines.values()) <= 130
    assert {name: count for name, count in lines.items() if count > 450} == {}


def test_functions_are_short():
    """Decorators, signature and docstring included."""
    long = {}
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min((part.lineno for part in node.decorator_list), default=node.lineno)
                if (count := node.end_lineno - first + 1) > 80:
                    long[f"{name}:{node.lineno} {node.name}"] = count
    assert long == {}


def test_readme_is_read_without_scrolling_sideways():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120] == []


def counter():
    spec = importlib.util.spec_from_file_location("repeated_code", ROOT / "tools/repeated_code.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


FIRST = """
import os

@dataclass
class Field:
    a: int
    b: int

def report(run, table):
    \"\"\"A docstring.\"\"\"
    total = 0
    for row in table:
        total += row.size
        if row.size > run.limit:
            print(f"{row} is large")

    return total / len(table)
"""


def test_counter_sees_the_same_lines_and_those_with_other_names():
    repeated = counter()
    renamed = FIRST.replace("row", "item").replace("report", "other").replace("is large", "is too large")
    other_calls = FIRST.replace("row.size", "row.price")
    assert repeated.count({"a.py": FIRST, "b.py": FIRST}, "same") == {("a.py", "b.py"): (11, 4, 4)}
    assert repeated.count({"a.py": FIRST, "b.py": renamed}, "same") == {}
    assert repeated.count({"a.py": FIRST, "b.py": renamed}, "alike") == {("a.py", "b.py"): (6, 11, 11)}
    assert repeated.count({"a.py": FIRST, "b.py": other_calls}, "alike") == {}
    assert list(repeated.count({"a.py": FIRST, "b.py": other_calls}, "shape")) == [("a.py", "b.py")]


def test_counter_takes_no_declaration_for_code():
    repeated = counter()
    fields = "class Row:\n" + "".join(f"    {name}: int\n" for name in "abcdefgh")
    table = "TABLE = {\n" + "".join(f'    "{name}": (1, 2),\n' for name in "abcdefgh") + "}\n"
    for source in (fields, table):
        assert repeated.count({"a.py": source, "b.py": source}, "alike") == {}
        assert len(repeated.count({"a.py": source, "b.py": source}, "same")) == 1
