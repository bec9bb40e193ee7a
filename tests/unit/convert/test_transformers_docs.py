"""What docs/transformers.md shows runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.cli.main import main
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface
from hope_megatron.generation.complete import new_document
from hope_megatron.generation.sampling import SamplingOptions

pytest.importorskip("transformers", reason="the page is about transformers")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which `pip install -e '.[test]'` brings")

PAGE = Path(__file__).parents[3] / "docs/transformers.md"


def assert_ends_at_stop_string(model: Any, tokenizer: Any) -> None:
    """The same text as without it, until the string is there."""
    prompt = tokenizer("def main(", return_tensors="pt")
    length, settings = prompt["input_ids"].size(1), {"max_new_tokens": 40, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(1)
    free = model.generate(**prompt, **settings)[0, length:]
    stop = next(letter for letter in tokenizer.decode(free)[5:] if letter.isascii() and letter.isalnum())
    end = next(i for i in range(1, 41) if stop in tokenizer.decode(free[:i]))
    torch.manual_seed(1)
    stopped = model.generate(**prompt, **settings, stop_strings=[stop], tokenizer=tokenizer)[0, length:]
    assert stopped.tolist() == free[:end].tolist() and end < 40


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
    assert_ends_at_stop_string(names["model"], names["tokenizer"])
    assert abs(names["loss"].item() - math.log(300)) < 0.5
    again = names["AutoModelForCausalLM"].from_pretrained("tuned/chat", trust_remote_code=True)
    reread = names["AutoTokenizer"].from_pretrained("tuned/chat", trust_remote_code=True)
    ids = reread("<|user|>def main(", return_tensors="pt")["input_ids"]
    assert int(ids[0, 0]) == 300 and again(ids).logits.size(-1) == 302
    assert main(["import", "hf", "tuned/chat", "--tokenizer", "chat.model"]) == 0
    assert main(["import", "hf", "tuned/chat", "--model", "chat.yaml"]) == 0
    assert load_tokenizer("chat.model").encode("<|user|>def main(").tolist() == ids[0].tolist()
    assert yaml.safe_load(Path("chat.yaml").read_text())["model"]["vocab_size"] == 302
    for directory, vocab_size in (("tuned/model", 300), ("tuned/chat", 302)):
        ours = load_huggingface(directory)
        theirs = names["AutoModelForCausalLM"].from_pretrained(directory, trust_remote_code=True)
        assert ours.config.vocab_size == vocab_size
        with torch.no_grad():
            torch.testing.assert_close(ours.model(whole).logits, theirs(whole).logits, atol=1e-4, rtol=0)
