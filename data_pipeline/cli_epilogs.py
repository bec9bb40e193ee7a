"""What `hope data COMMAND --help` says below the options, by command."""

from __future__ import annotations

_SOURCES = """\
sources:
  files           text (.txt .md .rst .py), JSON lines (.jsonl .ndjson), .json, .parquet, .arrow, .tar of such files;
                  all but .parquet and .arrow also with .gz .zst .bz2 .xz
  directories     every such file in them; the rest is left out and counted
  patterns        'corpus/*.log': files of other names are taken as text
                  (a directory of the datasets library is one of .arrow files)
  URLs            https://..., s3://..., gs://..., hf://datasets/... and whatever fsspec knows
  python-stdlib   the Python standard library's own sources, which every machine has
"""

EPILOGS = {
    "tokenizer": _SOURCES
    + """
examples:
  hope data tokenizer python-stdlib --vocab-size 4096 --out tokenizer.model
  hope data tokenizer 'corpus/*.jsonl.zst' --vocab-size 32000 --max-bytes 2G --out tokenizer.model
  hope data tokenizer --existing llama.model --out tokenizer.model
""",
    "prepare": _SOURCES
    + """
An interrupted command continues when it is run again, and ends with the same bytes.

examples:
  hope data prepare python-stdlib --tokenizer tokenizer.model --out data/stdlib --held-out 0.05
  hope data prepare corpus/ --tokenizer tokenizer.model --out data/corpus --text-field content --near-duplicates 0.8
  hope data prepare corpus/ --tokenizer gpt2/tokenizer.json --out data/gpt2
  hope data prepare book.txt --text-unit chunk --tokenizer tokenizer.model --out data/book

  # an array of Slurm jobs, then one merge
  sbatch --array=0-15 --wrap \\
    'hope data prepare corpus/ --tokenizer tokenizer.model --out data/corpus --slice $SLURM_ARRAY_TASK_ID/16'
  hope data merge data/corpus
""",
    "import": """\
The ids stay as they are; an end mark at the end of a document is taken off, because streams add it. An interrupted command
continues when it is run again.

examples:
  hope data import /data/pile_text_document --tokenizer gpt-neox/tokenizer.json --out data/pile --dry-run
  hope data import part-0 part-1 --tokenizer tokenizer.model --out data/web --held-out 0.005
""",
    "merge": """\
Exact duplicates between slices are removed.

example:
  hope data merge data/corpus
""",
    "verify": """\
The exit status is 1 if anything is wrong.

examples:
  hope data verify data/corpus
  hope data verify data/corpus/train --text   # also decode every document and check its text
""",
    "inspect": """\
examples:
  hope data inspect data/corpus/train                        # the first documents
  hope data inspect data/corpus/train --document 1234 --chars 0
  hope data inspect runs/hope_760m --step 900                 # what step 900 of a run read, or will read
""",
    "stats": """\
examples:
  hope data stats data/corpus
  hope data stats data/corpus --png lengths.png --json
""",
    "decode": """\
examples:
  hope data decode data/corpus/train --document 7 > document.txt
  hope data decode runs/hope_760m --sample 41                 # of a run: a directory of one, or its run file
  hope data decode --tokenizer tokenizer.model --ids 17 4 921
""",
    "drop": """\
The shards and the old manifest stay. A run goes on with the new manifest by a recorded --data-transition.

example:
  hope data drop data/corpus/train shard-000017.tar --out manifest-without-17.json
""",
}
