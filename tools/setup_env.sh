#!/usr/bin/env bash
# Makes the virtual environment and installs the project into it.
#
#   tools/setup_env.sh [run|test|dev]     run: what training needs; test, dev: with the tools for tests, or for everything
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the place. A torch that the interpreter already has is kept. Without a
# GPU the CPU build of torch is installed: never gigabytes of CUDA that nothing can use.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH="torch==2.13.0"
readonly CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly VENV="${VENV:-.venv}"
readonly EXTRA="${1:-run}"
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_PYTHON_VERSION_WARNING=1

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Exit code 0: a Python of a supported version. Prints where its torch is, if that is of a supported version.
probe_python() {
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata, sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
try:
    torch = importlib.metadata.distribution("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(0)
if (2, 11) <= tuple(int(part) for part in torch.version.split(".")[:2]) < (2, 16):
    print(torch.locate_file(""))
PY
}

# Sets python, and torch_dir if that Python has a torch to keep. The first with a torch wins, else the first.
find_python() {
  python="" torch_dir=""
  local candidate found
  for candidate in ${PYTHON:-python3 python python3.12 python3.13 python3.11}; do
    found="$(probe_python "$candidate")" || continue
    if [[ -n "$found" ]]; then
      python="$candidate" torch_dir="$found"
      return
    fi
    python="${python:-$candidate}"
  done
  [[ -n "$python" ]] || die "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ under PYTHON=$PYTHON}. On Debian or Ubuntu:
  sudo apt-get install python3 python3-venv
or name one: make PYTHON=/path/to/python3.11 ..."
}

make_venv() {
  find_python
  say "virtual environment $VENV with $("$python" --version)"
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv "$VENV"
  elif "$python" -c 'import virtualenv' 2>/dev/null; then
    "$python" -m virtualenv --quiet "$VENV"
  else
    die "$python cannot make virtual environments; on Debian or Ubuntu install the missing part:
  sudo apt-get install python3-venv"
  fi
  if [[ -n "$torch_dir" ]]; then
    say "keeping torch from $torch_dir"
    # Like --system-site-packages, but also for a Python that is in a virtual environment or has a user site.
    echo "$torch_dir" > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"
  fi
  "$VENV/bin/pip" install --quiet "pip>=23.1" "setuptools>=70" wheel
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# Whether the torch that pip would take brings no CUDA along. Reads metadata only; downloads nothing.
candidate_is_cpu_build() {
  local report
  report="$("$VENV/bin/pip" install --quiet --dry-run --no-deps --report - "$TORCH" 2>/dev/null)" || return 1
  "$VENV/bin/python" -c '
import json, sys
needs = [line for item in json.loads(sys.argv[1])["install"] for line in item["metadata"].get("requires_dist", [])]
sys.exit(any(line.startswith(("nvidia-", "cuda-")) for line in needs))' "$report"
}

install_torch() {
  [[ -z "$(probe_python "$VENV/bin/python")" ]] || return 0
  if has_gpu || candidate_is_cpu_build; then
    say "$TORCH"
    "$VENV/bin/pip" install "$TORCH"
  else
    say "no GPU: the CPU build of $TORCH, from $CPU_INDEX"
    "$VENV/bin/pip" install --index-url "$CPU_INDEX" "$TORCH"
  fi
}

case "$EXTRA" in
  run) target="." ;;
  test | dev) target=".[$EXTRA]" ;;
  *) die "unknown kind of environment '$EXTRA'; use run, test or dev" ;;
esac
[[ -x "$VENV/bin/pip" ]] || make_venv
install_torch
say "installing the project and what it needs (minutes the first time)"
"$VENV/bin/pip" install --quiet --quiet --editable "$target"
touch "$VENV/.ready-$EXTRA"
say "ready: $VENV/bin/hope"
