"""What docs/transformers.md shows runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.cli.main import main
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface
from hope_megatron.generation.complete import new_document
from hope_megatron.generation.sampling import SamplingOptions

pytest.importorskip("transformers", reason="the page is about transformers")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which `pip install -e '.[test]'` brings")

PAGE = Path(__file__).parents[3] / "docs/transformers.md"


def test_every_block_runs(
    make_checkpoint: Callable[..., CheckpointSource],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export_huggingface(make_checkpoint(), tmp_path / "model", tokenizer)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict = {"DIR": str(tmp_path / "model")}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    whole = torch.cat((names["book"], names["question"]), 1)
    assert names["four"].shape[0] == 4 and torch.equal(names["other"][:, : whole.size(1)], whole)
    assert int(names["begun"][0, 0]) == tokenizer.eos_id
    decoder = new_document(load_huggingface("model").model, tokenizer)
    decoder.append(torch.from_numpy(tokenizer.encode("def main("))[None])
    greedy = SamplingOptions(temperature=0.0)
    ours = [int(token) for token in decoder.generate(20, greedy, torch.Generator())]
    theirs = names["document"][0, names["begun_as_in_training"].size(1) :].tolist()
    assert theirs == ours[: len(theirs)] and (len(theirs) == 20 or theirs[-1] == tokenizer.eos_id)
    assert abs(names["loss"].item() - math.log(300)) < 0.5
    again = names["AutoModelForCausalLM"].from_pretrained("tuned/chat", trust_remote_code=True)
    reread = names["AutoTokenizer"].from_pretrained("tuned/chat", trust_remote_code=True)
    ids = reread("<|user|>def main(", return_tensors="pt")["input_ids"]
    assert int(ids[0, 0]) == 300 and again(ids).logits.size(-1) == 302
    assert main(["import", "hf", "tuned/chat", "--tokenizer", "chat.model"]) == 0
    assert main(["import", "hf", "tuned/chat", "--model", "chat.yaml"]) == 0
    assert Tokenizer.load("chat.model").encode("<|user|>def main(").tolist() == ids[0].tolist()
    assert yaml.safe_load(Path("chat.yaml").read_text())["model"]["vocab_size"] == 302
    for directory, vocab_size in (("tuned/model", 300), ("tuned/chat", 302)):
        ours = load_huggingface(directory)
        theirs = names["AutoModelForCausalLM"].from_pretrained(directory, trust_remote_code=True)
        assert ours.config.vocab_size == vocab_size
        with torch.no_grad():
            torch.testing.assert_close(ours.model(whole).logits, theirs(whole).logits, atol=1e-4, rtol=0)
