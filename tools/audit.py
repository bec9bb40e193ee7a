"""Known weaknesses of the versions in constraints/, by pip-audit, which asks PyPI's advisories about each.

    make audit                        or: python tools/audit.py [FILE ...]
    make audit ARGS=--require         no answer is a failure, as in CI

Exit code 0: none is known, or nobody could be asked, which is said in one line. 1: some are, with the versions that mend them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def audit(file: Path) -> tuple[list[str], list[str], str]:
    """(weaknesses, packages that could not be asked about, why nobody answered) of the pins in a file."""
    options = [
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "--format",
        "json",
        "--requirement",
        str(file),
    ]
    done = subprocess.run([sys.executable, "-m", "pip_audit", *options], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"pip-audit ended with code {done.returncode}"]
        return [], [], lines[-1][:160]
    return judge(report)


def judge(report: dict[str, Any]) -> tuple[list[str], list[str], str]:
    """The same of pip-audit's report. It takes a package that its source does not know for a harmless one; a mirror knows none."""
    weak, unknown = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for weakness in package.get("vulns", ()):
            mended = ", ".join(weakness["fix_versions"]) or "no version yet"
            weak.append(f"{package['name']} {package['version']}: {weakness['id']}, mended in {mended}")
    nobody = len(unknown) == len(report["dependencies"])
    return weak, unknown, "the package index has no advisories (a mirror?)" if nobody else ""


def main() -> int:
    """`python tools/audit.py [FILE ...]`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(ROOT.glob("constraints/*.txt")))
    parser.add_argument("--require", action="store_true", help="fail where nobody could be asked")
    args = parser.parse_args()
    code = 0
    for file in args.files:
        weak, unknown, why = audit(file)
        if why:
            print(f"{file.name} was not audited: {why}; try again where there is network")
            code = code or int(args.require)
            continue
        print(
            f"{file.name}: {len(weak)} known weaknesses"
            + (f"; not asked about: {', '.join(unknown)}" if unknown else "")
        )
        for line in weak:
            print(f"  {line}")
        code = 1 if weak else code
    return code


if __name__ == "__main__":
    sys.exit(main())
