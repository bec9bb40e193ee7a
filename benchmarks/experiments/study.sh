#!/usr/bin/env bash
# The scaling study of configs/sweeps/families.yaml, or of another sweep on its data: parts.
#
#     benchmarks/experiments/study.sh data       packages, their text, a tokenizer, shards: 20 minutes, 4 GB in runs/study
#     benchmarks/experiments/study.sh run        cells that docs/records/data/families.json does not have yet, WORKERS at a time (1)
#     benchmarks/experiments/study.sh run parts  the same of configs/sweeps/parts.yaml
#     benchmarks/experiments/study.sh report     laws and pictures, in runs/sweeps/families
#
# Each can be interrupted and goes on. Results of finished cells go to docs/records/data/SWEEP.json, so that any machine goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
python=${PYTHON:-python}
sweep=${2:-families}
results=docs/records/data/$sweep.json

case ${1:-} in
    data)
        "$python" benchmarks/experiments/study_corpus.py --out runs/study/corpus ${MIRROR:+--mirror "$MIRROR"}
        "$python" -m hope_megatron data tokenizer runs/study/corpus/*.jsonl --vocab-size 2048 --max-bytes 40M --out runs/study/tokenizer.model
        "$python" -m hope_megatron data prepare runs/study/corpus/*.jsonl --tokenizer runs/study/tokenizer.model --out runs/study/data \
            --near-duplicates 0.8 --max-repeated-lines 0.5
        ;;
    run) "$python" -m hope_megatron sweep run "$sweep" --workers "${WORKERS:-1}" --results "$results" ;;
    report) "$python" -m hope_megatron sweep report "$sweep" --results "$results" ;;
    *) sed -n '2,10p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
