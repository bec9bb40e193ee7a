#!/usr/bin/env bash
# docs/stories.md, "A team on Weights & Biases": two trackers at once, offline. Sending to a server needs one.
. "$(dirname "$0")/common.sh"
small_text
hope data tokenizer text.jsonl --vocab-size 300 --out data/tokenizer.model
hope data prepare text.jsonl --tokenizer data/tokenizer.model --out data/set --held-out 0.2
export WANDB_MODE=offline WANDB_SILENT=true
hope train hope_tiny_cpu name=story "${TINY[@]}" data.train=data/set/train data.heldout=data/set/heldout \
  data.tokenizer=data/tokenizer.model "tracking={sinks: [wandb, tensorboard], experiment: hope-340m, tags: {team: memory}}"
ls runs/story/wandb/offline-run-*/*.wandb runs/story/tensorboard/events.out.*
