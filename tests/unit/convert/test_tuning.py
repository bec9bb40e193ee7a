"""What people fine-tune with takes the exported model: PEFT's adapters, TRL's SFT on chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface
from tests.unit.convert.test_transformers import VOCAB, make_model

transformers = pytest.importorskip("transformers", reason="the exported modelling code needs transformers")


def test_adapters_learn_and_merge(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="`pip install -e '.[test]'` brings it")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "output", "up", "down"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model().float(), config)
    ids = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model().float(), tmp_path).eval()
    with torch.no_grad():
        logits = model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, logits, atol=0, rtol=0)
        text = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=0)
        assert text.shape == (2, 15)


def test_sft_on_chats_and_back(
    make_checkpoint: Callable[..., CheckpointSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="`pip install -e '.[test]'` brings it")
    datasets = pytest.importorskip("datasets", reason="trl brings it")
    export_huggingface(make_checkpoint(), tmp_path / "model", tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    rows = [
        {"messages": [{"role": "user", "content": f"value {i}"}, {"role": "assistant", "content": f"return {i}"}]}
        for i in range(8)
    ]
    arguments = trl.SFTConfig(
        str(tmp_path / "sft"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=theirs)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    ids = torch.tensor([theirs("User: value 1\nAssistant:")["input_ids"]])
    with torch.no_grad():
        ours = load_huggingface(tmp_path / "tuned").model(ids).logits
        torch.testing.assert_close(ours, trainer.model.eval()(ids).logits, atol=1e-4, rtol=0)
