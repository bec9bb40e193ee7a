"""Run transformers' own tests on the classes that an export carries: of models, configurations, generation and pipelines.

The installed package has no tests. Its source distribution, downloaded or given, has those of models and configurations
(ModelTesterMixin, ConfigTester). Those of generation and pipelines lie in transformers' repository only.

    python tools/transformers_contract.py                  the installed version: models and configurations
    python tools/transformers_contract.py --sdist FILE     a source distribution that lies here
    python tools/transformers_contract.py --tests FILE     generation and pipelines too, from the repository at a tag:
                        git archive --prefix=transformers/ -o FILE v5.15.0 tests
    python tools/transformers_contract.py -k resize        options behind these go to pytest
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
# Mixins and values that the source distribution leaves out; what they hold is not for a model of ours, or stands here. The common
# part of the pipelines' tests reads the sources of the whole repository; a model's test needs one class of it.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\nclass ExportGenerateTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "pipelines/test_pipelines_common.py": "class ANY:\n    def __init__(self, *types): self.types = types\n"
    "    def __eq__(self, other): return isinstance(other, self.types)\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, "
    "'chunk_size_feed_forward': 5, 'architectures': ['BertModel'], 'problem_type': 'regression'}\n",
}


def main() -> int:
    """Unpack, run, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="transformers-VERSION.tar.gz")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="archive (.tar.gz) of the repository's tests")
    args, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _pip("install", "--target", folder, "parameterized>=0.9,<1")
        package = work / "tests_of_transformers"
        if args.tests:
            _unpack(args.tests, package, ("generation/test_utils.py", "pipelines/test_pipelines_text_generation.py"))
        _unpack(args.sdist or _download(work), package)
        _complete(package)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", str(ROOT / "tools/transformers_contract_cases.py"), "-q", "-rs"]
        _write(work / "pytest.ini", "[pytest]\n")  # its markers are not this repository's
        options = ["-c", str(work / "pytest.ini"), "-p", "no:cacheprovider", "-W", "ignore", *pytest_options]
        return subprocess.run([*command, *options], env=environment, cwd=ROOT).returncode


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def _download(work: Path) -> Path:
    wanted = f"transformers=={transformers.__version__}"
    _pip("download", "--no-deps", "--no-build-isolation", "--no-binary", "transformers", "--dest", str(work), wanted)
    return next(work.glob("transformers-*.tar.gz"))


def _unpack(archive: Path, package: Path, only: tuple[str, ...] = ("",)) -> None:
    """Tests whose path begins with one of `only`, as a package of another name: this repository has a `tests` of its own."""
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            path = Path(member.name)
            name = "/".join(path.parts[2:])
            if member.isfile() and path.parts[1:2] == ("tests",) and path.suffix == ".py" and name.startswith(only):
                content = file.extractfile(member)
                assert content is not None
                _write(package / name, content.read().decode().replace("from tests.", f"from {package.name}."))


def _complete(package: Path) -> None:
    for name, text in STUBS.items():
        if not (package / name).exists():
            _write(package / name, text)
    for directory in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
