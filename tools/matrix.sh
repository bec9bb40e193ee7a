#!/usr/bin/env bash
# The tests against the oldest or the newest versions that the project claims, in a virtual environment of their own.
#
#   tools/matrix.sh oldest|newest [PYTEST ARGUMENTS]     default: tests/unit tests/distributed
#
# PYTHON=python3.13 chooses the interpreter (default: python3.11 for oldest, python3.13 for newest), MATRIX_DIR=dir the place. The
# versions are those of constraints/NAME.txt. torch comes with CUDA from PyPI: 5 GB per environment.
set -euo pipefail
cd "$(dirname "$0")/.."

name="${1:-}"
case "$name" in
  oldest) python="${PYTHON:-python3.11}" ;;
  newest) python="${PYTHON:-python3.13}" ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
shift
[[ $# -gt 0 ]] || set -- tests/unit tests/distributed
venv="${MATRIX_DIR:-build/matrix}/$name"
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1

if [[ ! -e "$venv/.ready" ]]; then
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet "setuptools>=70" wheel
  # DeepSpeed's build looks for torch.
  "$venv/bin/pip" install --quiet -c "constraints/$name.txt" torch numpy
  "$venv/bin/pip" install --quiet -c "constraints/$name.txt" --no-build-isolation -e '.[test]'
  touch "$venv/.ready"
fi
"$venv/bin/python" - <<'PY'
import platform
from hope_megatron.config.environment import installed_versions
print("Python", platform.python_version(), *(f"{name} {version}" for name, version in installed_versions().items() if version))
PY
"$venv/bin/python" -m pytest -q -rs "$@"
