"""A crash, or a power cut, at every single file operation of a save: the old checkpoint or the new one always loads."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from hope_megatron.testing.crash import Crash, FileOperations
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build


def every_operation(rank: int, world_size: int, directory: str) -> dict[str, object]:
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.checkpoint.format import Checkpoint, CheckpointDamagedError, list_checkpoints
    from hope_megatron.training.state import TrainingState

    base, config = Path(directory), tiny_run_config()
    engine, state = build(config), TrainingState()

    def describe() -> dict[str, object]:
        return {"progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {}}

    for _ in range(2):  # what the save under test finds: two checkpoints, the older of which it will remove
        advance(engine, config, state, 1)
        Checkpointer(engine, base / "before").save_now(describe())
    advance(engine, config, state, 1)

    def crashing_save(crash_at: int | None, power_cut: bool) -> FileOperations:
        work = base / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base / "before", work)
        (work / ".tmp-step-00000009").mkdir()  # of an earlier crash
        threading.excepthook = lambda args: None if args.exc_type is Crash else threading.__excepthook__(args)
        with FileOperations(work, crash_at, power_cut).watching() as operations:
            try:
                Checkpointer(engine, work).save_now(describe())
            except Crash:
                assert operations.crashed
            except Exception:
                assert operations.crashed, "only a crash may end a save"
        return operations

    def newest_good() -> int:
        for path in list_checkpoints(base / "work"):
            try:
                checkpoint = Checkpoint(path)
                checkpoint.verify()
                checkpoint.check_description()
                return checkpoint.step
            except CheckpointDamagedError:
                continue
        return -1

    total = crashing_save(None, False).count
    loaded = {power_cut: [] for power_cut in (False, True)}
    for power_cut in loaded:
        for crash_at in range(total):
            crashing_save(crash_at, power_cut)
            loaded[power_cut].append(newest_good())
    # leftovers never block: the next save succeeds, and clears them away
    Checkpointer(engine, base / "work").save_now(describe())
    left = sorted(path.name for path in (base / "work").iterdir())
    return {"total": total, "loaded": loaded, "after": newest_good(), "left": left}


@pytest.mark.distributed
def test_the_old_or_the_new_checkpoint_always_loads(tmp_path: Path) -> None:
    (seen,) = run_distributed(every_operation, 1, str(tmp_path), timeout_s=240)
    assert seen["total"] > 30
    for steps in seen["loaded"].values():
        assert set(steps) == {2, 3}, steps
        assert steps == sorted(steps), "once the new one is there it stays"
    assert seen["after"] == 3
    assert seen["left"] == ["step-00000002", "step-00000003"]
