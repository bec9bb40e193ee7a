# What the stories share: a directory of their own, and the `hope` of the interpreter under test.
set -euo pipefail
cd "${STORY_DIR:?a directory for what the story writes}"
hope() { "${STORY_PYTHON:-python3}" -m hope_megatron "$@"; }
# A model of a few thousand parameters, and two steps: what is tried is the way, not the model.
TINY=(model.vocab_size=300 model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.memory.chunk_tokens=16
  "model.cms.levels=[{hidden_size: 32}]" training.steps=2 training.seq_length=32 training.global_batch_size=2
  training.micro_batch_size=1 training.eval_sequences=2 training.eval_every=0 training.log_every=1 optim.warmup_steps=1)
small_text() {
  for i in $(seq 60); do printf '{"text": "document %s says %s and %s more than before"}\n' "$i" $((i * 7)) $((i * i)); done > text.jsonl
}
