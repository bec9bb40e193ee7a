#!/usr/bin/env bash
# The paper's tests on small models, in order of worth, one CPU core.
#
#     benchmarks/experiments/paper_tests.sh                every suite, all families
#     benchmarks/experiments/paper_tests.sh languages      one of them
#     DATA=DIR FAMILIES="hope deltanet" benchmarks/experiments/paper_tests.sh languages
#
# Each finished training is a line in DATA/SUITE.json (docs/records/data), so that the same command goes on exactly where it
# stopped. Tables and pictures are written beside it when a suite is whole. With FAMILIES the rows of other families stay in the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TORCHDYNAMO_DISABLE=1
data=${DATA:-docs/records/data}
families=(${FAMILIES:+--families $FAMILIES})

suite() {
    nice -n 10 "${PYTHON:-python}" -m hope_megatron eval suite "$@" --out "$data"
}

run() {
    case $1 in
        languages) suite languages "${families[@]}" ;;
        permutations) suite permutations "${families[@]}" ;;
        recall) suite recall --steps 800 "${families[@]}" ;;
        mad) suite mad --steps 800 "${families[@]}" ;;
        needles) suite needles --lengths 128 512 2048 8192 65536 "${families[@]}" ;;
        classes) suite classes --steps 800 "${families[@]}" ;;
        domains) suite domains --steps 300 "${families[@]}" ;;
        families) suite families "${families[@]}" ;;
        ablations) suite ablations --steps 600 "${families[@]}" ;;
        *) echo "no suite $1; known: languages permutations recall mad needles families classes domains ablations" >&2; exit 2 ;;
    esac
}

for name in "${@:-languages permutations recall mad needles families classes domains ablations}"; do
    for one in $name; do run "$one"; done
done
