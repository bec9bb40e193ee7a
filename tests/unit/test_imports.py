"""Who imports whom: arrows point down, and what runs on a login node imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_contracts_of_pyproject_hold():
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "hope_megatron",
        "hope_megatron.config",
        "hope_megatron.config.footprint",
        "hope_megatron.cli.main",
        "hope_megatron.ops.memory.rule",
        "data_pipeline",
        "launch",
        "launch.local",
    ],
)
def test_importing_brings_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_configuration_page_is_what_the_schema_says():
    done = subprocess.run(
        [sys.executable, "tools/make_config_docs.py", "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_file_imports_itself_by_way_of_others():
    """Imports inside of functions too; those for type checkers alone are not made."""
    files = {name: path for room in ("hope_megatron", "data_pipeline", "launch") for name, path in modules(room)}
    imported = {name: {other for other in imports(path, name, files) if other != name} for name, path in files.items()}
    assert len(imported) > 400 and sum(map(len, imported.values())) > 1000
    while free := [name for name, others in imported.items() if not others & imported.keys()]:
        for name in free:
            del imported[name]
    assert imported == {}


def modules(room: str) -> Iterator[tuple[str, Path]]:
    for path in (ROOT / room).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, name: str, files: dict[str, Path]) -> Iterator[str]:
    """Modules of this project that a file imports, at its head or later."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            base = ".".join(filter(None, [package, node.module])) if node.level else node.module or ""
            found = [inner if (inner := f"{base}.{alias.name}") in files else base for alias in node.names]
        else:
            continue
        yield from (module for module in found if module in files)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, but not what stands below `if TYPE_CHECKING:`."""
    typing_only = isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"
    for node in tree.orelse if typing_only else ast.iter_child_nodes(tree):
        yield node
        yield from statements(node)
