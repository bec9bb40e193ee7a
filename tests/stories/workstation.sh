#!/usr/bin/env bash
# docs/stories.md, "A GPU workstation": text to tokenizer, shards, training on all devices, report, text.
. "$(dirname "$0")/common.sh"
small_text
hope data tokenizer text.jsonl --vocab-size 300 --out data/tokenizer.model
hope data prepare text.jsonl --tokenizer data/tokenizer.model --out data/set --held-out 0.2
data=(data.train=data/set/train data.heldout=data/set/heldout data.tokenizer=data/tokenizer.model)
hope train hope_tiny_cpu name=story "${TINY[@]}" "${data[@]}" --dry-run > dry_run.txt
grep "processes, data parallel" dry_run.txt
hope train hope_tiny_cpu name=story "${TINY[@]}" "${data[@]}" tracking.mlflow=false
hope report runs/story
hope generate runs/story --prompt "document " --max-new-tokens 4
