"""A checkpoint as four ranks (TP 2 x DP 2, ZeRO) would have written it, of a tiny model whose logits are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.format import (
    DESCRIPTION,
    PROBE_NAME,
    FileDigest,
    rank_file_name,
    step_directory_name,
    write_json,
    write_manifest,
    write_safetensors,
)
from hope_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.optim import read_tags, split_shards
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

TP, DP, STEP = 2, 2, 40


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real SentencePiece model of 300 ids."""
    texts = [f"def function_{i}(argument, value={i}):\n    return argument + value * {i}\n" for i in range(300)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> LanguageModel:
    """The model behind the checkpoint."""
    init_distributed(ParallelConfig())
    return build_model(tiny_model(vocab_size=tokenizer.vocab_size), seed=3).eval()


@pytest.fixture
def make_checkpoint(tmp_path: Path, model: LanguageModel, tokenizer: Tokenizer) -> Callable[..., CheckpointSource]:
    """Writes RUN/checkpoints/step-00000040; `precision` and `probe` vary what it says about itself."""

    def make(precision: str = "fp32", probe: bool = True, probe_error: float = 0.0) -> CheckpointSource:
        run = tmp_path / "run"
        directory = run / "checkpoints" / step_directory_name(STEP)
        directory.mkdir(parents=True)
        tokenizer.save(run / "tokenizer.model")
        config = _run_config(model.model_config, run, precision)
        digests = _write_pieces(directory, model)
        if probe:
            tokens = torch.randint(model.model_config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                logits = model(tokens).logits.contiguous() + probe_error
            digests[PROBE_NAME] = write_safetensors(directory / PROBE_NAME, {"tokens": tokens, "logits": logits})
        digests[DESCRIPTION] = write_json(directory / DESCRIPTION, _description(config, model, digests))
        write_manifest(directory, digests)
        return CheckpointSource(directory)

    return make


def _run_config(model: ModelConfig, run: Path, precision: str) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=run.parent,
        model=model,
        parallel=ParallelConfig(tensor_parallel=TP, sequence_parallel=True),
        training=TrainingConfig(steps=100, seq_length=32, global_batch_size=4, precision=precision),
        data=DataConfig(train=run / "train", tokenizer=run / "tokenizer.model"),
    )


def _shards(model: LanguageModel) -> dict[str, list[Tensor]]:
    """Each parameter as the tensor-parallel ranks hold it; replicated ones by the first alone."""
    found = {}
    for name, parameter in model.named_parameters():
        tags = read_tags(parameter, name, parameter.shape)
        sharded = tags.partition_dim is not None
        found[name] = split_shards(parameter.detach(), tags, TP) if sharded else [parameter.detach()]
    return found


def _cuts(numel: int) -> list[tuple[int, int]]:
    """ZeRO cuts a flat shard where it likes: (offset, numel) for each data-parallel rank."""
    first = numel * 2 // 3
    return [(0, first), (first, numel - first)]


def _write_pieces(directory: Path, model: LanguageModel) -> dict[str, FileDigest]:
    digests = {}
    for dp_rank in range(DP):
        for tp_rank in range(TP):
            tensors = {}
            for name, shards in _shards(model).items():
                if tp_rank < len(shards):
                    flat = shards[tp_rank].contiguous().flatten()
                    offset, numel = _cuts(flat.numel())[dp_rank]
                    tensors[f"master/{name}"] = flat[offset : offset + numel]
            file = rank_file_name(dp_rank * TP + tp_rank)
            digests[file] = write_safetensors(directory / file, tensors)
    return digests


def _description(config: RunConfig, model: LanguageModel, digests: dict[str, FileDigest]) -> dict:
    shards = _shards(model)
    files = []
    for dp_rank in range(DP):
        for tp_rank in range(TP):
            held = {name: parts[tp_rank].numel() for name, parts in shards.items() if tp_rank < len(parts)}
            pieces = [[name, *_cuts(numel)[dp_rank], ["master"]] for name, numel in held.items()]
            files.append(
                {
                    "file": rank_file_name(dp_rank * TP + tp_rank),
                    "tp_rank": tp_rank,
                    "dp_rank": dp_rank,
                    "pieces": pieces,
                }
            )
    parameters = [
        {
            "name": name,
            "shard_shape": list(shards[name][0].shape),
            "dtype": "float32",
            "tags": read_tags(parameter, name, parameter.shape).to_dict(),
        }
        for name, parameter in model.named_parameters()
    ]
    return {
        "progress": {"step": STEP, "samples": 160, "tokens": 5120, "wall_s": 1.0},
        "config": config.model_dump(mode="json"),
        "provenance": {"commit": None, "versions": {"torch": torch.__version__}},
        "data": {"sample": 160},
        "layout": ParallelLayout(TP, DP, 1, True).describe(),
        "optimizer": {"name": config.optim.name, "groups": {}},
        "parameters": parameters,
        "files": files,
    }
