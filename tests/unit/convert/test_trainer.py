"""transformers' Trainer on the exported class: the loss and gradient of a batch, however it is divided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.convert.test_transformers import PAD, make_model

transformers = pytest.importorskip("transformers", reason="the exported modelling code needs transformers")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which `pip install -e '.[test]'` brings")

ROWS = torch.randint(4, 61, (8, 32), generator=torch.Generator().manual_seed(0))
LABELS = ROWS.clone()
for _row in range(8):
    LABELS[
        _row, : 4 * _row + 1
    ] = -100  # from 31 labels down to 3; the first is never predicted, but older Trainers count it


class Sum(transformers.TrainerCallback):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.log: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.log |= logs or {}


def train(directory: Path, batch: int, accumulation: int, **options: Any) -> dict[str, float]:
    seen = Sum()
    arguments = transformers.TrainingArguments(
        str(directory),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": x, "labels": y} for x, y in zip(ROWS, LABELS)]
    transformers.Trainer(make_model().float(), arguments, train_dataset=data, callbacks=[seen]).train()
    return seen.log


def reference() -> tuple[float, float]:
    """Mean loss over all labels that count, and its gradient's norm, in float64, row by row."""
    model, total = make_model().train(), 0.0
    count = int((LABELS[:, 1:] != -100).sum())
    for x, y in zip(ROWS, LABELS):
        logits = model(x[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, y[1:], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    loss, norm = reference()
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        log = train(tmp_path, batch, accumulation)
        assert log["loss"] == pytest.approx(loss, rel=1e-4), (batch, accumulation)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-4), (batch, accumulation)
    log = train(tmp_path, 2, 4, gradient_checkpointing=True)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_bf16_is_near_float32(tmp_path: Path) -> None:
    loss, norm = reference()
    log = train(tmp_path, 8, 1, bf16=True)
    assert log["loss"] == pytest.approx(loss, rel=1e-2) and log["loss"] != pytest.approx(loss, rel=1e-6)
    assert log["grad_norm"] == pytest.approx(norm, rel=5e-2)


def test_a_compiled_model_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, whose kernels take half a minute: benchmarks/costs/compile_export.py runs those."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    loss, norm = reference()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        log = train(tmp_path, 8, 1, torch_compile=True, torch_compile_backend="aot_eager")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    assert (log["loss"], log["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)


def test_texts_of_unequal_length_are_evaluated_and_predicted(tmp_path: Path) -> None:
    """Right-padded batches, as every collator makes them."""
    model, lengths = make_model().float(), (32, 5, 17, 9)
    data = [{"input_ids": x[:n].tolist(), "labels": x[:n].tolist()} for x, n in zip(ROWS, lengths)]

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = lambda key, value: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])  # noqa: E731
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        return {"input_ids": fill("input_ids", PAD), "labels": fill("labels", -100), "attention_mask": mask}

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, data_collator=collate, eval_dataset=data)
    with torch.no_grad():
        alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in data]
    sums = [
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="sum")
        for logits, row in zip(alone, data)
    ]
    expected = float(sum(sums)) / sum(n - 1 for n in lengths)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predictions = trainer.predict(data).predictions
    assert predictions.shape == (4, 32, 61)
    for found, logits, n in zip(predictions, alone, lengths):
        torch.testing.assert_close(torch.from_numpy(found[:n]), logits, atol=1e-4, rtol=0)
