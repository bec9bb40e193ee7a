"""DeepSpeed's own ZeRO checkpoints: theirs start a run, and ours are theirs, file by file, and loaded by DeepSpeed."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.checkpoint.format import Checkpoint, read_full_tensors
from hope_megatron.checkpoint.reshard import write_checkpoint
from hope_megatron.checkpoint.unsharded import compare_unsharded, read_unsharded
from hope_megatron.config import CMSConfig, CMSLevelConfig
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.convert.begin_run import begin_run, go_on
from hope_megatron.convert.deepspeed.native import read_native, write_native
from hope_megatron.convert.deepspeed.zero import zero_shards
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build

# ZeRO 1 and 3 keep different wrappers for float32, bf16 with float32 gradients, and learning rates by width.
LAYOUTS: dict[str, tuple[ParallelLayout, dict[str, Any]]] = {
    "tp2dp2-zero1": (ParallelLayout(2, 2, 1), {}),
    "tp2dp2-zero1-bf16": (ParallelLayout(2, 2, 1), {"precision": "bf16"}),
    "dp4-zero2-bf16": (ParallelLayout(1, 4, 2), {"precision": "bf16"}),
    "tp2dp2-zero3-mup": (ParallelLayout(2, 2, 3), {"mup_base_width": 16}),
}
LOADS = {  # a checkpoint, and the layout in which DeepSpeed loads it
    ("tp2dp2-zero1", "tp2dp2-zero3"): ParallelLayout(2, 2, 3),
    ("tp2dp2-zero3-mup", "tp2dp2-zero2-mup"): ParallelLayout(2, 2, 2),
    ("tp2dp2-zero1-bf16", "dp4-zero1-bf16"): ParallelLayout(1, 4, 1),
    ("dp4-zero2-bf16", "dp4-zero3-bf16"): ParallelLayout(1, 4, 3),
}


def run_config(layout: ParallelLayout, settings: dict[str, Any], **more: Any):
    return tiny_run_config(tp=layout.tensor_parallel, zero_stage=layout.zero_stage, **settings, **more)


def is_that_of(engine, checkpoint) -> bool:
    """Whether this rank holds what a checkpoint of ours holds for it: weights, optimizer states and clocks."""
    from hope_megatron.checkpoint.shards import group_scalars, live_shards

    mesh = engine.mesh
    return group_scalars(engine) == checkpoint.description["optimizer"]["groups"] and all(
        tuple(piece.tensors) == checkpoint.states(piece.parameter)
        and all(
            torch.equal(
                view,
                checkpoint.reshard_range(piece.parameter, state, mesh.tp_size, mesh.tp_rank, piece.offset, piece.numel),
            )
            for state, view in piece.tensors.items()
        )
        for piece in live_shards(engine)
    )


def save_both(rank, world_size, directory):
    """Train two steps in each layout; DeepSpeed saves, and so do we. Then DeepSpeed loads what we make of ours."""
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.checkpoint.generators import seed_generators
    from hope_megatron.training.state import TrainingState

    base, paths, next_steps, found = Path(directory), {}, {}, {}
    for name, (layout, settings) in LAYOUTS.items():
        config, state = run_config(layout, settings), TrainingState()
        engine = build(config)
        seed_generators(config.training.seed, engine.mesh.dp_rank)
        advance(engine, config, state, 2)
        engine._deepspeed.save_checkpoint(str(base / name / "deepspeed"))
        description = {"progress": state.to_dict(), "config": config.model_dump(mode="json")}
        description |= {"provenance": {}, "data": {}}
        paths[name] = Checkpointer(engine, base / name / "ours").save_now(description)
        next_steps[name] = advance(engine, config, state, 1)
    for (source, target), layout in LOADS.items():
        config, native = run_config(layout, LAYOUTS[source][1]), base / f"{source}-{target}"
        if rank == 0:
            write_native(read_unsharded(CheckpointSource(paths[source])), layout, native)
        engine = build(config)
        engine.control.gather(None)
        path, _ = engine._deepspeed.load_checkpoint(str(native))
        assert path is not None
        bitwise = is_that_of(engine, Checkpoint(paths[source]))
        found[source, target] = bitwise, advance(engine, config, TrainingState(2, 8), 1), next_steps[source]
    save_with_adam(base / "fp16", fp16=True)
    save_with_adam(base / "adam", fp16=False)
    return found


def save_with_adam(directory, fp16: bool):
    """DeepSpeed alone on our model with PyTorch's AdamW: fp16, TP 2 x DP 2, ZeRO 2; or one step in float32, DP 4, ZeRO 1.

    It refuses fp16 on a CPU for its speed; nothing is computed then, so it is told that the CPU knows it.
    """
    from megatron.core import parallel_state

    from hope_megatron.engine.deepspeed_setup import import_deepspeed
    from hope_megatron.engine.mpu import ModelParallelUnit
    from hope_megatron.model import build_model
    from hope_megatron.parallel.distributed import init_distributed

    config = tiny_run_config(tp=2 if fp16 else 1)
    parallel_state.destroy_model_parallel()
    init_distributed(config.parallel)
    deepspeed = import_deepspeed()
    deepspeed.get_accelerator().is_fp16_supported = lambda: fp16
    model = build_model(config.model, config.parallel, dtype=torch.float16 if fp16 else torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": fp16},
        "zero_optimization": {"stage": 2 if fp16 else 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.0),
        config=settings,
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    if not fp16:
        adam_step(engine)
    engine.save_checkpoint(str(directory))
    if not fp16:
        adam_step(engine)
        engine.save_checkpoint(f"{directory}-next")


def adam_step(engine) -> None:
    tokens = torch.arange(16)[None]
    engine.backward(engine(tokens, tokens).losses.sum())
    engine.step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("zero")
    return directory, run_distributed(save_both, 4, str(directory), timeout_s=300)


BEGINNING = {"progress": {"step": 0}, "data": {}, "provenance": {"commit": None, "versions": {}}}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_start_a_run_bit_for_bit(saved, tmp_path: Path, name: str) -> None:
    directory, _ = saved
    config = run_config(ParallelLayout(), LAYOUTS[name][1], output_dir=tmp_path)
    begin_run(directory / name / "deepspeed", "deepspeed", config, BEGINNING)
    source = find_checkpoint(str(config.run_dir))
    found, expected = dict(source.tensors()), dict(read_full_tensors(directory / name / "ours/step-00000002"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    clocks = source.checkpoint.description["optimizer"]["groups"]
    assert ("matrix/width" in clocks) == ("mup" in name)


def beginning(step: int, samples: int) -> dict[str, Any]:
    return {**BEGINNING, "progress": {"step": step, "samples": samples}}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_goes_on_with_every_state_and_clock(saved, tmp_path: Path, name: str) -> None:
    directory, _ = saved
    config = run_config(ParallelLayout(), LAYOUTS[name][1], output_dir=tmp_path)
    path = go_on(directory / name / "deepspeed", "deepspeed", config, beginning)
    found = read_unsharded(CheckpointSource(path))
    expected = read_unsharded(CheckpointSource(directory / name / "ours/step-00000002"))
    assert path.name == "step-00000002" and compare_unsharded(expected, found) > 0
    assert found.description["optimizer"] == expected.description["optimizer"]
    assert found.description["progress"] == {"step": 2, "samples": 8}


def adam_config(tmp_path: Path, name: str):
    levels = (CMSLevelConfig(hidden_size=32), CMSLevelConfig(hidden_size=16))
    return tiny_run_config(output_dir=tmp_path, optim={"name": name}, cms=CMSConfig(levels=levels))


@pytest.mark.distributed
def test_our_adamw_goes_on_as_pytorchs_does(saved, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hope_megatron.model import build_model
    from hope_megatron.optim import AdamW
    from hope_megatron.parallel.distributed import init_distributed

    source = CheckpointSource(go_on(saved[0] / "adam", "deepspeed", adam_config(tmp_path, "adamw"), beginning))
    assert "betas was (0.9, 0.999) there and is (0.9, 0.95) in the run file" in caplog.text
    config, unsharded = source.config, read_unsharded(source)
    init_distributed(config.parallel)
    model = build_model(config.model, config.parallel)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(unsharded.read(name, "master"))
    optimizer = AdamW(list(model.named_parameters()), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999))
    for group in optimizer.param_groups:
        clock = unsharded.description["optimizer"]["groups"][group["name"]]
        for parameter in group["params"]:
            states = {name: unsharded.read(parameter.optim_name, name).view(-1) for name in ("m1", "v")}
            optimizer.state[parameter] = {**clock, **states}
    tokens = torch.arange(16)[None]
    model(tokens, tokens).losses.sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed's default
    optimizer.step()
    expected = dict(zero_shards(saved[0] / "adam-next"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name][0], rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_states_of_another_optimizer_are_refused(saved, tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"keeps exp_avg, exp_avg_sq for .*, the run's m3 m1, m2, o2, v\. Set optim"
    ):
        go_on(saved[0] / "adam", "deepspeed", adam_config(tmp_path, "m3"), beginning)
    with pytest.raises(ConversionError, match="the run's adamw m1, pending_grad, v"):
        go_on(saved[0] / "adam", "deepspeed", tiny_run_config(output_dir=tmp_path, optim={"name": "adamw"}), beginning)
    with pytest.raises(ConversionError, match="another model than the run's"):
        wide = CMSConfig(levels=(CMSLevelConfig(hidden_size=32),))
        go_on(saved[0] / "adam", "deepspeed", tiny_run_config(output_dir=tmp_path, cms=wide), beginning)
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.distributed
def test_fp16_starts_a_run(saved, tmp_path: Path) -> None:
    from hope_megatron.model import build_model
    from hope_megatron.parallel.distributed import init_distributed

    directory, _ = saved
    config = tiny_run_config(output_dir=tmp_path)
    begin_run(directory / "fp16", "deepspeed", config, BEGINNING)
    init_distributed(config.parallel)
    expected = build_model(config.model, dtype=torch.float16).named_parameters()
    found = dict(find_checkpoint(str(config.run_dir)).tensors())
    assert all(torch.equal(found.pop(name), parameter.float()) for name, parameter in expected) and not found


@pytest.mark.distributed
def test_a_universal_checkpoint_of_deepspeeds_own_making_starts_a_run(saved, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    theirs = tmp_path / "theirs"
    shutil.copytree(saved[0] / "adam/global_step1", theirs)
    (file,) = theirs.glob("mp_rank_*")
    state = torch.load(file, weights_only=False)
    # The converter of 0.19.8 stumbles over Megatron-Core's `_extra_state`, which is None.
    state["module"] = {name: tensor for name, tensor in state["module"].items() if tensor is not None}
    torch.save(state, file)
    workers = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    out = {"input_folder": str(theirs), "output_folder": str(tmp_path / "ds/made")}
    ds_to_universal.main(Namespace(**out, **workers, strict=True, inject_missing_state=True))
    (tmp_path / "ds/latest_universal").write_text("made")
    config = tiny_run_config(output_dir=tmp_path)
    begin_run(tmp_path / "ds", "deepspeed", config, BEGINNING)
    found = dict(find_checkpoint(str(config.run_dir)).tensors())
    assert found.keys() == state["module"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state["module"].items())


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_our_files_are_those_of_deepspeed_and_come_back(saved, tmp_path: Path, name: str) -> None:
    theirs = saved[0] / name / "deepspeed/global_step2"
    source = CheckpointSource(saved[0] / name / "ours/step-00000002")
    write_native(read_unsharded(source), LAYOUTS[name][0], tmp_path / "native")
    ours = tmp_path / "native/global_step2"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (tmp_path / "native/latest").read_text() == (saved[0] / name / "deepspeed/latest").read_text()
    for path in theirs.iterdir():
        assert_same(load(ours / path.name), load(path), path.name)
    back = read_native(tmp_path / "native")
    write_checkpoint(back, back.layout, tmp_path / "back")
    for rank in range(4):
        file = f"rank-{rank:05d}.safetensors"
        assert_same(load_file(tmp_path / "back" / file), load_file(source.path / file), file)
    for key in ("progress", "data", "optimizer"):
        assert Checkpoint(tmp_path / "back").description[key] == source.checkpoint.description[key]


def load(path: Path) -> dict:
    """What a file says, but for what only helps other tools: DeepSpeed's settings, and what follows from the shapes."""
    content = torch.load(path, weights_only=False)
    content.pop("ds_config", None)
    content.get("optimizer_state_dict", {}).pop("param_slice_mappings", None)
    return content


def assert_same(left: Any, right: Any, where: str) -> None:
    if isinstance(right, dict):
        assert left.keys() == right.keys(), where
        pairs = [(left[key], right[key], f"{where}: {key}") for key in right]
    elif isinstance(right, (list, tuple)):
        assert len(left) == len(right), where
        pairs = [(a, b, f"{where}: {i}") for i, (a, b) in enumerate(zip(left, right))]
    elif isinstance(right, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
        return
    else:
        assert type(right).__name__ == "LossScaler" or left == right, where
        return
    for a, b, place in pairs:
        assert_same(a, b, place)


@pytest.mark.distributed
@pytest.mark.parametrize("case", LOADS, ids="-to-".join)
def test_deepspeed_loads_everything_in_another_layout(saved, case: tuple[str, str]) -> None:
    for found in saved[1]:
        bitwise, (step,), (expected,) = found[case]
        assert bitwise
        tolerance = 1e-2 if "bf16" in case[0] else 1e-5  # sums over other ranks have other roundings
        assert step == pytest.approx(expected, rel=tolerance)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.distributed
def test_a_pickle_that_acts_and_a_missing_rank_are_refused(saved, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved[0] / "tp2dp2-zero1/deepspeed", directory)
    file = directory / "global_step2/zero_pp_rank_1_mp_rank_01_optim_states.pt"
    torch.save({"optimizer_state_dict": _Bomb(tmp_path / "boom")}, file)
    with pytest.raises(ConversionError, match=rf"{file.name} is refused, nothing was executed: .* posix\.mkdir"):
        list(zero_shards(directory))
    assert not (tmp_path / "boom").exists()
    file.unlink()
    with pytest.raises(ConversionError, match="lacks files of some ranks"):
        list(zero_shards(directory))
    (directory / "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConversionError, match="on 2 data-parallel ranks, and 1 files are there"):
        list(zero_shards(directory))
