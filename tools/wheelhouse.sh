#!/usr/bin/env bash
# Wheels for machines without a network: collected here, installed there.
#
#   tools/wheelhouse.sh [DIR] [EXTRAS]      default: wheelhouse, and data,hf,tensorboard
#
# On a machine with network, of the same kind (Python version, processor) as the one without. There, with the directory copied:
#
#   python3 -m venv .venv
#   .venv/bin/pip install --no-index --find-links wheelhouse 'hope_megatron[data,hf,tensorboard]'
#
# PYTHON=python3.12 chooses the interpreter; CONSTRAINTS=constraints/newest.txt locks versions; NO_TORCH=1 leaves torch and what only
# it needs out, for machines whose module or container has one.
set -euo pipefail
cd "$(dirname "$0")/.."

directory="${1:-wheelhouse}"
extras="${2:-data,hf,tensorboard}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet "setuptools>=70" wheel
mkdir -p "$directory"
constraint=(${CONSTRAINTS:+-c "$CONSTRAINTS"})

# DeepSpeed has no wheel, and its build looks for torch: first what needs no building, then the rest with it at hand.
"$pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$directory" .
ours=("$directory"/hope_megatron-*.whl)
"$pip" download --quiet --dest "$directory" "setuptools>=70" wheel
"$pip" install --quiet "${constraint[@]}" "torch>=2.11,<2.16" "numpy>=1.26,<3"
"$pip" wheel --quiet "${constraint[@]}" --no-build-isolation --wheel-dir "$directory" "${ours[0]}[$extras]"
if [[ -n "${NO_TORCH:-}" ]]; then
  rm -f "$directory"/torch-*.whl "$directory"/nvidia_*.whl "$directory"/cuda_*.whl "$directory"/triton-*.whl
fi
(cd "$directory" && sha256sum -- *.whl > SHA256SUMS)
printf '%s: %s files, %s\n' "$directory" "$(wc -l < "$directory/SHA256SUMS")" "$(du -sh "$directory" | cut -f1)"
