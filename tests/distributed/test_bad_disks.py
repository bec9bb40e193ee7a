"""A run on a real disk that hangs, fills up, has no inodes left, or becomes read-only while it trains."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

pytestmark = [pytest.mark.distributed]

STEPS, BAD_STEP = 40, 9


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in a file."""
    image, mounted = tmp_path / "image", tmp_path / "disk"
    mounted.mkdir()
    for command in (
        ["truncate", "-s", "24M", image],
        ["mkfs.ext4", "-q", "-F", "-N", "300", image],
        ["mount", "-o", "loop", image, mounted],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not make and mount a file system: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["fsfreeze", "--unfreeze", mounted], capture_output=True)
    subprocess.run(["umount", mounted], check=True)


def spoil(kind: str, disk: Path) -> None:
    if kind == "hangs":
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
    elif kind == "full":
        (disk / "filler").mkdir()
        for size in ("64k", "1k"):  # to the last block
            command = ["dd", "if=/dev/zero", f"of={disk / 'filler' / size}", f"bs={size}"]
            subprocess.run(command, stderr=subprocess.DEVNULL)
        subprocess.run(["sync", "-f", disk])  # what is written later takes blocks of its own
    elif kind == "no inodes":
        (disk / "filler").mkdir()
        with contextlib.suppress(OSError):  # there is none left
            for number in range(400):
                (disk / "filler" / str(number)).touch()
    else:
        subprocess.run(["mount", "-o", "remount,abort", disk], check=True)


def mend(kind: str, disk: Path) -> None:
    if kind == "hangs":
        subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
    else:
        subprocess.run(["rm", "-rf", disk / "filler"], check=True)


def train(rank, world_size, disk, kind, every, bad_s, until=0, at="after step"):
    """The state at the end, what was logged, and how many steps were done while the disk was bad."""
    import logging
    import threading

    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.testing.drill import final_state
    from hope_megatron.training.run import run_training

    done_meanwhile, mended = [], threading.Event()

    def later():
        if not mended.is_set():
            mended.set()
            mend(kind, disk)

    def watch(phase, step):
        if phase == "before step" and step == BAD_STEP and kind:
            spoil(kind, disk)
            timer = threading.Timer(bad_s, later)
            timer.start() if bad_s else None
        if phase == "after step" and step >= BAD_STEP and not mended.is_set():
            done_meanwhile.append(step)
        if phase == at and step == until:
            later()

    watch.engine = None
    HEART.listeners[:] = [watch]
    config = tiny_run_config(
        output_dir=disk,
        training={"steps": STEPS, "memory_every": 0},
        checkpoint={"every": every, "keep_last": 2},
    )
    said, error, state = [], "", {}
    message = logging.Logger.makeRecord

    def keep(*args, **kwargs):  # the log lies on the disk in question
        said.append(message(*args, **kwargs).getMessage())
        return message(*args, **kwargs)

    logging.Logger.makeRecord = keep
    try:
        run_training(config, RepeatingSource())
    except Exception as found:
        error = str(found)
    if any(config.run_dir.glob("checkpoints/step-*/manifest.json")):
        state = final_state(config.run_dir)
    return state, error, done_meanwhile, "\n".join(said)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ((state, error, _, _),) = run_distributed(train, 1, tmp_path_factory.mktemp("undisturbed"), "", 10, 0)
    assert not error, error
    return state


def test_metrics_and_logs_on_a_disk_that_hangs_do_not_stop_training(disk: Path, undisturbed: dict[str, str]) -> None:
    ((state, error, meanwhile, log),) = run_distributed(train, 1, disk, "hangs", 100, 100.0, STEPS - 1)
    assert not error, error
    assert state == undisturbed
    assert meanwhile == list(range(BAD_STEP, STEPS)), "only then the disk came back"
    assert "metrics.jsonl cannot be written: the disk does not answer" in log
    assert "step 40/40" in (disk / "tiny" / "train.log").read_text()


def test_metrics_that_wait_come_when_the_last_save_finds_room(disk: Path, undisturbed: dict[str, str]) -> None:
    """The disk is full until after the last record has been made."""
    ((state, error, _, log),) = run_distributed(train, 1, disk, "full", 100, 100.0, STEPS, "save")
    assert not error, error
    assert "records wait in memory" in log and state == undisturbed


@pytest.mark.parametrize("kind", ["hangs", "full", "no inodes"])
def test_a_save_waits_for_the_disk_or_is_repeated(disk: Path, undisturbed: dict[str, str], kind: str) -> None:
    ((state, error, _, log),) = run_distributed(train, 1, disk, kind, 10, 1.5)
    assert not error, error
    assert state == undisturbed
    assert ("the checkpoint of step" in log) is (kind != "hangs"), "a save that hangs is waited for"


def test_on_a_disk_that_stays_read_only_the_run_stops_with_its_older_checkpoint(disk: Path) -> None:
    ((state, error, meanwhile, _),) = run_distributed(train, 1, disk, "read-only", 5, 0)
    assert "failure 5 in a row. Older checkpoints are safe" in error and state["step"] == "step-00000005"
    assert meanwhile[-1] > 10, "training went on after the first failure"
