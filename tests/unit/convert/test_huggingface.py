"""An export proves itself or leaves nothing; what is read back is the checkpoint, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from hope_megatron.checkpoint.errors import ConversionError, ExportCheckError
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.checkpoint.format import CheckpointDamagedError
from hope_megatron.convert.huggingface.check import ExportCheck
from hope_megatron.convert.huggingface.digests import DIGESTS_NAME
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface
from hope_megatron.convert.huggingface.weights import SINGLE_NAME
from hope_megatron.model import LanguageModel

MakeCheckpoint = Callable[..., CheckpointSource]


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000])
def test_round_trip_from_tensor_and_data_parallel_pieces_is_bitwise(
    make_checkpoint: MakeCheckpoint, model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path, max_shard_bytes: int
) -> None:
    out = tmp_path / "model"
    export = export_huggingface(make_checkpoint(), out, tokenizer, max_shard_bytes=max_shard_bytes)
    loaded = load_huggingface(out)
    expected = dict(model.named_parameters())
    found = dict(loaded.model.named_parameters())
    assert found.keys() == expected.keys()
    vocab_size = model.model_config.vocab_size
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != "embedding.weight")
    # the rows behind the vocabulary, which tensor parallelism needs and nothing reads, do not travel
    assert torch.equal(found["embedding.weight"][:vocab_size], expected["embedding.weight"][:vocab_size])
    assert not found["embedding.weight"][vocab_size:].any()
    assert loaded.config == model.model_config
    assert loaded.train_tokens_per_sequence == 32
    assert load_tokenizer(loaded.tokenizer_file).digest == tokenizer.digest
    assert export.num_parameters == sum(p.numel() for p in model.parameters())
    assert load_huggingface(str(out)).config == loaded.config
    assert export.check.max_difference == 0.0 and export.check.reference == "the training processes"
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes < 1 << 20)


def test_an_export_of_an_earlier_version_is_read(
    make_checkpoint: MakeCheckpoint, model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Our names, and rows that pad the vocabulary."""
    export_huggingface(make_checkpoint(), tmp_path / "model", tokenizer)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, tmp_path / "model" / SINGLE_NAME, metadata={"format": "pt"})
    (tmp_path / "model" / DIGESTS_NAME).unlink()
    found = dict(load_huggingface(tmp_path / "model").model.named_parameters())
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_files_say_what_they_are(make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_huggingface(make_checkpoint(), out, tokenizer)
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one may read all
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("hope", tokenizer.vocab_size)
    assert config["eos_token_id"] == tokenizer.eos_id
    card = (out / "README.md").read_text()
    assert "| tokens | 5,120 |" in card and "largest difference" in card
    assert "`tokenizer.json` is the same tokenizer for transformers" in card
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id


def test_a_wrong_probe_undoes_the_export(make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = make_checkpoint(probe_error=1e-3)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportCheckError, match=r"difference 1\.0e-03"):
        export_huggingface(source, tmp_path / "model", tokenizer)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "heldout", "kind"),
    [
        ({"precision": "bf16", "probe_error": 1e-3}, None, "32 held-out"),
        ({"probe": False}, torch.arange(20)[None], "20 held-out"),
        ({"probe": False}, None, "32 random"),
    ],
    ids=["coarse probe", "held-out tokens", "nothing at hand"],
)
def test_without_a_fine_probe_the_checkpoint_itself_is_the_reference(
    make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path, changes: dict, heldout, kind: str
) -> None:
    export = export_huggingface(make_checkpoint(**changes), tmp_path / "model", tokenizer, heldout=heldout)
    assert export.check.reference == "the checkpoint's weights in float32"
    assert export.check.max_difference == 0.0
    assert str(export.check).startswith(f"logits of {kind} tokens") and "; perplexity " in str(export.check)


def test_another_perplexity_fails_and_so_does_nan() -> None:
    check = ExportCheck("a test", 8, "held-out", 5e-5, 2.0, 2.0)
    assert check.passed
    assert not replace(check, exported_loss=2.001).passed
    assert not replace(check, exported_loss=float("nan")).passed
    assert not replace(check, max_difference=2e-4).passed and not replace(check, max_difference=float("nan")).passed


def test_a_damaged_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = make_checkpoint()
    file = source.path / "rank-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match="rank-00002"):
        export_huggingface(source, tmp_path / "model", tokenizer)
    assert not (tmp_path / "model").exists()


def test_an_earlier_export_is_replaced_and_anything_else_refused(
    make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "model"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="no earlier export"):
        export_huggingface(source, out, tokenizer)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    export_huggingface(source, out, tokenizer)
    (out / "leftover").write_text("of the first export")
    export_huggingface(source, out, tokenizer)
    assert not (out / "leftover").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_another_tokenizer_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    other = train_tokenizer(["some other text"] * 50, tmp_path / "other.model", 275)
    with pytest.raises(ConversionError, match=r"has 275 ids.* 300"):
        export_huggingface(make_checkpoint(), tmp_path / "model", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_size": 64}, "hidden_size=64 contradicts"),
        ({"architecture": {"num_heads": 2}}, r"config\.json.*architecture"),
        ({"train_tokens_per_sequence": "many"}, "train_tokens_per_sequence"),
    ],
)
def test_a_wrong_configuration_is_named(
    make_checkpoint: MakeCheckpoint, tokenizer: Tokenizer, tmp_path: Path, change: dict, message: str
) -> None:
    out = tmp_path / "model"
    export_huggingface(make_checkpoint(), out, tokenizer)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConversionError, match=r"config\.json is not what was exported"):
        load_huggingface(out)
    (out / DIGESTS_NAME).unlink()  # somebody changed it on purpose
    with pytest.raises(ValueError, match=message):
        load_huggingface(out)


def test_references_find_checkpoints(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, run = make_checkpoint(), tmp_path / "run"
    for reference in (run, f"{run}@40", source.path):
        assert find_checkpoint(str(reference)).path == source.path
    with pytest.raises(ConversionError, match="no complete checkpoint of step '7'; it has 40"):
        find_checkpoint(f"{run}@7")
    (source.path / "manifest.json").unlink()
    with pytest.raises(ConversionError, match="no run directory with a complete checkpoint"):
        find_checkpoint(str(run))
