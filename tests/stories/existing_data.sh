#!/usr/bin/env bash
# docs/stories.md, "Data that is tokenized already": files of Megatron-Core's builder, ids of a tokenizer.json.
. "$(dirname "$0")/common.sh"
"${STORY_PYTHON:-python3}" - <<'PY'
import numpy as np
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

texts = [f"document {i} says {i * 7} and {i * i} more than before" for i in range(60)]
bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = tokenizers.decoders.ByteLevel()
alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
)
bpe.train_from_iterator(texts, trainer)
bpe.save("tokenizer.json")
builder = IndexedDatasetBuilder("corpus_text_document.bin", dtype=np.uint16)
for text in texts:
    ids = [*bpe.encode(text).ids, 0]
    builder.add_document(np.array(ids, np.uint16), [len(ids)])
builder.finalize("corpus_text_document.idx")
PY
size=$("${STORY_PYTHON:-python3}" -c 'import tokenizers; print(tokenizers.Tokenizer.from_file("tokenizer.json").get_vocab_size())')
hope data import corpus_text_document --tokenizer tokenizer.json --out data --held-out 0.2
hope data verify data --text
hope train hope_tiny_cpu name=story "${TINY[@]}" model.vocab_size="$size" data.train=data/train data.heldout=data/heldout \
  data.tokenizer=data/tokenizer.json tracking.mlflow=false
hope export hf runs/story exported
cmp tokenizer.json exported/tokenizer.json
