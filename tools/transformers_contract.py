"""Run transformers' own model tests (ModelTesterMixin, ConfigTester) on the classes that an export carries.

The installed package has no tests, its source distribution has these. It is downloaded from the package index, or given.

    python tools/transformers_contract.py                  the installed version
    python tools/transformers_contract.py --sdist FILE     a source distribution that lies here
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
# Mixins and values that the source distribution leaves out; what they hold is not for a model of ours, or stands here.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, "
    "'chunk_size_feed_forward': 5, 'architectures': ['BertModel'], 'problem_type': 'regression'}\n",
}


def main() -> int:
    """Unpack, run, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="transformers-VERSION.tar.gz")
    args, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _pip("install", "--target", folder, "parameterized>=0.9,<1")
        _unpack(args.sdist or _download(work), work / "tests_of_transformers")
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


def _unpack(archive: Path, package: Path) -> None:
    """The tests of a source distribution as a package of another name: this repository has a `tests` of its own."""
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            path = Path(member.name)
            if member.isfile() and path.parts[1:2] == ("tests",) and path.suffix == ".py":
                content = file.extractfile(member)
                assert content is not None
                _write(package.joinpath(*path.parts[2:]), content.read().decode())
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
