"""Saving in the background, keeping, finding and loading the checkpoints of a run.

A save costs the training step one copy to host memory. A thread then writes this rank's file while training goes on.
At a later step boundary, when `poll` finds that all ranks have written, rank 0 adds description and manifest and renames
the directory into place: a crash at any moment leaves the old checkpoints, or the old and the new one.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.format import (
    DESCRIPTION,
    FORMAT,
    GENERATOR_PREFIX,
    Checkpoint,
    CheckpointDamagedError,
    CheckpointError,
    FileDigest,
    checkpoint_step,
    list_checkpoints,
    rank_file_name,
    step_directory_name,
    write_json,
    write_manifest,
    write_safetensors,
)
from hope_megatron.checkpoint.generators import generator_states, restore_generators
from hope_megatron.checkpoint.retention import TEMPORARY, Retention, remove_checkpoint, sealed_checkpoints
from hope_megatron.checkpoint.same_model import check_same_model
from hope_megatron.checkpoint.shards import group_scalars, live_shards, load_shards, parameter_table
from hope_megatron.engine.engine import Engine
from hope_megatron.runtime.failures import TRANSIENT
from hope_megatron.runtime.files import sync_directory

log = logging.getLogger(__name__)

_MAX_PAUSE_S = 30.0


class CheckpointSaveError(CheckpointError):
    """Several saves in a row have failed, or the one that had to succeed."""

    failure_kind = TRANSIENT


@dataclass
class _PendingSave:
    """A save between its copy to host memory and its commit."""

    step: int
    directory: Path
    thread: threading.Thread | None = None
    description: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, FileDigest] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Checkpointer:
    """The checkpoints of one run. Every method is collective: all ranks call it at the same step.

    Args:
        engine: what is saved and loaded.
        directory: where the step directories lie; this run must hold its lock.
        keep_last: number of newest checkpoints that stay.
        keep_every: checkpoints at multiples of this many steps stay forever.
        keep_best: number of checkpoints with the lowest `heldout_loss` in their description that stay.
        max_failed_saves: failures in a row that are an error.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: int = 0,
        max_failed_saves: int = 3,
    ) -> None:
        self.engine = engine
        self.directory = directory
        self._retention = Retention(keep_last, keep_every, keep_best)
        self.max_failed_saves = max_failed_saves
        self._stall_s = 0.0
        self._control = engine.control
        self._rank = engine.mesh.rank
        self._pending: _PendingSave | None = None
        self.failed_saves = 0
        """Saves in a row that have failed; the same on all ranks."""
        self._host_buffers: dict[str, Tensor] = {}
        if self._rank == 0 and directory.is_dir():
            for leftover in directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # -- saving --------------------------------------------------------------------------------------------------

    def save(
        self, description: Mapping[str, Any], extra_files: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Begin to save. Returns when the state is in host memory.

        Args:
            description: what the training loop knows: `progress` with `step`, `config`, `provenance`, ...; JSON values.
            extra_files: file name -> tensors, written by rank 0.

        Raises:
            CheckpointSaveError: if an earlier save failed, once too often.
        """
        started = time.perf_counter()
        try:
            self._begin_save(description, extra_files)
        finally:
            self._stall_s += time.perf_counter() - started

    @property
    def saving(self) -> bool:
        """Whether a save has begun and `poll` has not yet finished it."""
        return self._pending is not None

    def take_stall_s(self) -> float:
        """Seconds that this rank's training has waited in `save` and `poll` since the last call of this method."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def _begin_save(
        self, description: Mapping[str, Any], extra_files: Mapping[str, Mapping[str, Tensor]] | None
    ) -> None:
        self.wait()
        step = description["progress"]["step"]
        pending = self._pending = _PendingSave(step, self.directory / f"{TEMPORARY}{step_directory_name(step)}")
        tensors, table = self._copy_to_host()
        files = [entry for entry in self._control.gather(table) if entry["pieces"]]
        if self._rank == 0:
            pending.description = {**description, **self._describe_engine(files)}
            pending.error = _attempt(lambda: _make_fresh(pending.directory))
        if self._control.broadcast(pending.error is not None):
            return  # poll() reports it
        extra = {name: dict(content) for name, content in (extra_files or {}).items()} if self._rank == 0 else {}
        extra[rank_file_name(self._rank)] = tensors
        pending.thread = threading.Thread(
            target=_write_files, args=(pending, extra), name="checkpoint-writer", daemon=True
        )
        pending.thread.start()

    def poll(self) -> Path | None:
        """Commit a save that all ranks have written; to be called after every step.

        Returns:
            The new checkpoint, when there is one.

        Raises:
            CheckpointSaveError: on all ranks, when `max_failed_saves` saves in a row have failed.
        """
        pending = self._pending
        if pending is None:
            return None
        started = time.perf_counter()
        try:
            return self._commit_if_written(pending)
        finally:
            self._stall_s += time.perf_counter() - started

    def _commit_if_written(self, pending: _PendingSave) -> Path | None:
        running, failed = self._control.maximum([pending.running, pending.error is not None])
        if running:
            return None
        self._pending = None
        digests = self._control.gather({name: [file.sha256, file.size] for name, file in pending.digests.items()})
        final = self.directory / step_directory_name(pending.step)
        if not failed and self._rank == 0:
            merged = {name: FileDigest(*found) for of_rank in digests for name, found in of_rank.items()}
            pending.error = _attempt(lambda: self._commit(pending, final, merged))
        errors = [
            f"rank {rank}: {error}" for rank, error in enumerate(self._control.gather(_text(pending.error))) if error
        ]
        if errors:
            self._report_failure(pending, errors)
            return None
        self.failed_saves = 0
        return final

    def wait(self) -> Path | None:
        """Finish the save that is under way, if any. Raises like `poll`."""
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join()
        return self.poll()

    def save_now(
        self, description: Mapping[str, Any], extra_files: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> Path:
        """Save and wait for it; try again after a pause if it fails.

        Raises:
            CheckpointSaveError: when `max_failed_saves` saves in a row have failed.
        """
        while True:
            self.save(description, extra_files)
            if (path := self.wait()) is not None:
                return path
            time.sleep(min(2.0 ** (self.failed_saves - 1), _MAX_PAUSE_S))

    def _copy_to_host(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Host copies of everything this rank saves, and its entry in the table of files."""
        tensors: dict[str, Tensor] = {}
        pieces = []
        for piece in live_shards(self.engine):
            pieces.append([piece.parameter, piece.offset, piece.numel, list(piece.tensors)])
            for state, view in piece.tensors.items():
                tensors[f"{state}/{piece.parameter}"] = self._host_copy(f"{state}/{piece.parameter}", view)
        if self.engine.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        tensors |= {f"{GENERATOR_PREFIX}{name}": state.clone() for name, state in generator_states().items()}
        mesh = self.engine.mesh
        entry = {"file": rank_file_name(self._rank), "tp_rank": mesh.tp_rank, "dp_rank": mesh.dp_rank, "pieces": pieces}
        return tensors, entry

    def _host_copy(self, key: str, view: Tensor) -> Tensor:
        """A copy in host memory that is reused from save to save (pinned on CUDA; the caller synchronises)."""
        buffer = self._host_buffers.get(key)
        if buffer is None or buffer.shape != view.shape:
            buffer = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
            self._host_buffers[key] = buffer
        return buffer.copy_(view, non_blocking=view.is_cuda)

    def _describe_engine(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        config, mesh = self.engine.config, self.engine.mesh
        return {
            "format": FORMAT,
            "layout": config.layout(mesh.world_size).describe(),
            "optimizer": {"name": config.optim.name, "groups": group_scalars(self.engine)},
            "parameters": parameter_table(self.engine),
            "files": files,
        }

    def _commit(self, pending: _PendingSave, final: Path, digests: dict[str, FileDigest]) -> None:
        """Seal the directory, rename it into place, and let go of old checkpoints (rank 0)."""
        digests[DESCRIPTION] = write_json(pending.directory / DESCRIPTION, pending.description)
        write_manifest(pending.directory, digests)
        if final.exists():  # a damaged one of the same step
            remove_checkpoint(final)
        os.rename(pending.directory, final)
        sync_directory(self.directory)
        self._retention.apply(self.directory)

    def sealed(self) -> list[Path]:
        """Checkpoints that were written to their end, newest first."""
        return sealed_checkpoints(self.directory)

    def _report_failure(self, pending: _PendingSave, errors: list[str]) -> None:
        self.failed_saves += 1
        if self._rank == 0:
            shutil.rmtree(pending.directory, ignore_errors=True)
        text = f"the checkpoint of step {pending.step} could not be written to {self.directory} ({'; '.join(errors)})"
        if self.failed_saves >= self.max_failed_saves:
            raise CheckpointSaveError(
                f"{text}; this was failure {self.failed_saves} in a row. Older checkpoints are safe. Free space there or "
                "choose another output_dir, then resume"
            )
        if self._rank == 0:
            log.error("%s; older checkpoints are safe, training goes on", text)

    # -- loading -------------------------------------------------------------------------------------------------

    def load_latest(self) -> Checkpoint | None:
        """Load the newest checkpoint whose files are all as they were written; older ones stand in for damaged ones.

        Returns:
            What was loaded; None if the directory holds no checkpoint at all.

        Raises:
            CheckpointError: if all are damaged, or the newest good one belongs to another model.
        """
        candidates = self._control.broadcast(list_checkpoints(self.directory) if self._rank == 0 else None)
        problems = []
        for path in candidates:
            try:
                checkpoint = self._open_verified(path)
            except CheckpointDamagedError as error:
                problems.append(str(error))
                if self._rank == 0:
                    log.warning("checkpoint %s is damaged and left out: %s", path.name, error)
                continue
            self._load(checkpoint)
            return checkpoint
        if problems:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged:\n  " + "\n  ".join(problems) + "\n"
                "Restore one of them, or start again under another name."
            )
        return None

    def load(self, path: Path) -> Checkpoint:
        """Load one checkpoint, after verifying it.

        Raises:
            CheckpointDamagedError: naming the file that is missing or differs.
            CheckpointError: if it belongs to another model.
        """
        checkpoint = self._open_verified(path)
        self._load(checkpoint)
        return checkpoint

    def load_weights(self, path: Path) -> Checkpoint:
        """Load the weights of another run's checkpoint, after verifying it; optimizer, clocks and generators stay new.

        Raises:
            as `load`.
        """
        checkpoint = self._open_verified(path)
        check_same_model(checkpoint, self.engine.config.model.model_dump(mode="json"), periods=False)
        load_shards(self.engine, checkpoint, weights_only=True)
        return checkpoint

    def _open_verified(self, path: Path) -> Checkpoint:
        """Digest the files, each by one rank; the verdict is everybody's."""
        checkpoint, error = None, None
        try:
            checkpoint = Checkpoint(path)
            if self._rank == 0:
                checkpoint.warn_of_foreign_files()
            checkpoint.check_description()
            checkpoint.verify(sorted(checkpoint.digests)[self._rank :: self.engine.mesh.world_size])
        except CheckpointDamagedError as found:
            error = found
        self._control.raise_together(error)
        assert checkpoint is not None
        return checkpoint

    def _load(self, checkpoint: Checkpoint) -> None:
        check_same_model(checkpoint, self.engine.config.model.model_dump(mode="json"))
        load_shards(self.engine, checkpoint)
        if self._rank == 0 and checkpoint.path.resolve().parent == self.directory.resolve():
            self._set_newer_aside(checkpoint_step(checkpoint.path))
        layout, mesh = checkpoint.description["layout"], self.engine.mesh
        if (layout["world_size"], layout["tensor_parallel"]) == (mesh.world_size, mesh.tp_size):
            restore_generators(checkpoint.rank_tensors(self._rank, GENERATOR_PREFIX))
        elif self._rank == 0:
            log.info(
                "the checkpoint was written by %d ranks with tensor parallel %d; random generators start afresh",
                layout["world_size"],
                layout["tensor_parallel"],
            )

    def _set_newer_aside(self, step: int) -> None:
        """Rename checkpoints later than the loaded one: they are damaged, or of a future that this run has left."""
        for path in list_checkpoints(self.directory):
            if checkpoint_step(path) > step:
                aside = path.with_name(f"abandoned-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
                log.warning("%s is later than the checkpoint in use and was renamed to %s", path.name, aside.name)


def _write_files(pending: _PendingSave, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Body of the writer thread."""
    try:
        for name, tensors in files.items():
            pending.digests[name] = write_safetensors(pending.directory / name, tensors)
    except BaseException as error:  # whatever it was, it surfaces at the next step on all ranks
        pending.error = error
        if not isinstance(error, Exception):
            raise


def _make_fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _attempt(action: Any) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def _text(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
