"""`hf://datasets/...` as a source, with the real huggingface_hub against a hub on this machine. Nothing leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import load_tokenizer
from data_pipeline.prepare import prepare
from hope_megatron.eval.heldout import manifest_tokens

from .hub import NAME, running_hub
from .test_data_hf_tokenizer import TEXTS, write_bpe

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def test_a_data_set_of_the_hub_is_prepared_as_its_files_are(tmp_path: Path) -> None:
    tokenizer = write_bpe(tmp_path / "tokenizer.json")
    halves = {f"data/{i}.jsonl": TEXTS[i::2] for i in range(2)}
    files = {name: "".join(json.dumps({"text": t}) + "\n" for t in texts).encode() for name, texts in halves.items()}
    for name, data in files.items():
        (tmp_path / Path(name).name).write_bytes(data)
    prepare([tmp_path / "*.jsonl"], tokenizer, tmp_path / "local", held_out_fraction=0.0, workers=1)
    command = [sys.executable, "-m", "hope_megatron", "data", "prepare", f"hf://datasets/{NAME}/data/*.jsonl"]
    command += ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "remote"), "--held-out", "0", "--workers", "1"]
    with running_hub(files) as hub:
        # huggingface_hub reads these when it is imported, hence a process of its own
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
        assert {line.rpartition("/")[2] for line in hub.asked if "/resolve/" in line} == {"0.jsonl", "1.jsonl"}
    tokens = [manifest_tokens(tmp_path / name / "train", load_tokenizer(tokenizer)) for name in ("local", "remote")]
    assert np.array_equal(*tokens) and len(tokens[0]) > len(TEXTS)
    with running_hub({}) as hub:
        command[4] = f"hf://datasets/{NAME}/data/1.jsonl"
        result = subprocess.run(
            [*command, "--out", str(tmp_path / "none")],
            env={**os.environ, **own, "HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 2 and "1.jsonl" in result.stderr and "Traceback" not in result.stderr
