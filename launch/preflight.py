"""What can be known before anything is queued. Every check is made, so that one look shows all mistakes."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hope_megatron.config import ConfigError, RunConfig
from hope_megatron.config.footprint import footprint
from hope_megatron.config.hardware import GB, find_hardware
from hope_megatron.config.torch_build import torch_of
from launch import slurm
from launch.cluster import ClusterConfig, parse_time_limit
from launch.errors import LaunchError

_DIGEST_BYTES = 4 << 30
"""Of shards, digested by a preflight: seconds on a login node."""
_ACTIVATE = re.compile(r"\s*(?:source|\.)\s+(\S+)/bin/activate\s*$")
_USABLE_GPU_SHARE = 0.92
"""The rest goes to the CUDA context, NCCL's buffers and fragmentation."""


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found; with a remedy if it is not ok."""

    def __str__(self) -> str:
        return f"  {'ok  ' if self.ok else 'FAIL'}  {self.name}: {self.detail}"


class PreflightError(LaunchError):
    """The run would not start, or not survive."""


def preflight(config: RunConfig, cluster: ClusterConfig, nodes: int, *, data_exists: bool = True) -> list[Check]:
    """Check a run against a cluster, without Slurm.

    Args:
        data_exists: whether the data must be there already; they are not when an earlier job of a chain makes them.
    """
    checks = [_check("ranks", lambda: _ranks(config, cluster, nodes))]
    if checks[0].ok:
        checks.append(_check("memory", lambda: _memory(config, cluster, nodes)))
        checks.append(_check("run directory", lambda: _run_directory(config, cluster, nodes)))
    if cluster.gpus_per_node:
        checks.append(_check("torch", lambda: _torch(cluster)))
    if data_exists:
        checks.append(_check("tokenizer", lambda: _tokenizer(config.data.tokenizer)))
        checks.append(_check("data.train", lambda: _split(config.data.train, config)))
        for name, path in config.data.mix_with.items():
            checks.append(_check(f"data.mix_with.{name}", partial(_split, path, config)))
        if (heldout := config.data.heldout) is not None:
            checks.append(_check("data.heldout", lambda: _split(heldout, config)))
    return checks


def slurm_preflight(cluster: ClusterConfig, nodes: int, script: Path) -> list[Check]:
    """Check a rendered batch script against the limits that Slurm tells."""
    return [
        _check("partition", lambda: _partition(cluster, nodes)),
        _check("sbatch --test-only", lambda: slurm.would_accept(script)),
    ]


def require(checks: list[Check]) -> None:
    """Refuse to go on if a check failed.

    Raises:
        PreflightError: naming every failed check.
    """
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    if failed:
        raise PreflightError("preflight failed, nothing was submitted\n  - " + "\n  - ".join(failed))


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (ConfigError, LaunchError, slurm.SlurmError) as error:
        return Check(name, False, str(error))


def _ranks(config: RunConfig, cluster: ClusterConfig, nodes: int) -> str:
    per_node, tp = cluster.ranks_per_node, config.parallel.tensor_parallel
    world_size = nodes * per_node
    dp = config.data_parallel(world_size)
    if per_node % tp:
        raise LaunchError(
            f"{per_node} ranks per node are not divisible by parallel.tensor_parallel={tp}, so that a tensor-parallel group "
            "would cross nodes; use a divisor"
        )
    return (
        f"{nodes} x {per_node} = {world_size}: tensor parallel {tp}, data parallel {dp}, "
        f"accumulation {config.accumulation_steps(world_size)}, {config.training.tokens_per_step:,} tokens per step"
    )


def _memory(config: RunConfig, cluster: ClusterConfig, nodes: int) -> str:
    needed = footprint(config, nodes * cluster.ranks_per_node)
    host_gb = needed.host * cluster.ranks_per_node / GB
    if cluster.gpus_per_node:
        capacity, where = (
            find_hardware(cluster.hardware).memory_bytes * _USABLE_GPU_SHARE,
            f"per {cluster.hardware} usable",
        )
    elif cluster.memory_per_node_gb:
        capacity, where = cluster.memory_per_node_gb * GB / cluster.ranks_per_node, "per rank asked for"
    else:
        return f"about {needed.total / GB:.1f} GB per rank; the cluster file does not say how much there is (memory_per_node_gb)"
    if needed.total > capacity:
        raise LaunchError(
            f"about {needed.total / GB:.1f} GB per rank, but {capacity / GB:.1f} GB {where}; more nodes or a higher "
            "parallel.zero_stage shard more, training.recompute=layer and a smaller training.micro_batch_size keep less "
            "(see `hope plan`)"
        )
    if cluster.memory_per_node_gb and host_gb > cluster.memory_per_node_gb:
        raise LaunchError(
            f"parallel.cpu_offload needs about {host_gb:.0f} GB of host memory per node, "
            f"memory_per_node_gb={cluster.memory_per_node_gb}; raise it"
        )
    return f"about {needed.total / GB:.1f} of {capacity / GB:.1f} GB {where}"


def _torch(cluster: ClusterConfig) -> str:
    """The torch of the ranks: pip on a login node without a GPU installs one that GPU nodes cannot use."""
    if cluster.container is not None:
        return f"that of the image {cluster.container.image}, not looked at"
    activated = [match[1] for line in cluster.setup if (match := _ACTIVATE.match(line))]
    python = shutil.which(cluster.python)
    if activated:
        prefix = Path(activated[-1])
    elif cluster.setup or python is None:
        return "not looked at: the set-up lines decide which it is"
    else:
        prefix = Path(python).parent.parent
    found = torch_of(prefix)
    if found is None:
        return f"none to be seen in {prefix}"
    if found.is_cpu:
        raise LaunchError(
            f"{prefix} holds torch {found.version}, a CPU build, and the cluster file has gpus_per_node={cluster.gpus_per_node}; "
            "install a CUDA build there (on a GPU node pip chooses it; else https://pytorch.org/get-started)"
        )
    return f"{found.version} in {prefix}, for {f'CUDA {found.cuda}' if found.cuda else f'ROCm {found.hip}'}"


def _run_directory(config: RunConfig, cluster: ClusterConfig, nodes: int) -> str:
    existing = next(path for path in (config.run_dir, *config.run_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LaunchError(f"{existing} cannot be written; choose another output_dir")
    needed = checkpoint_bytes(config, nodes * cluster.ranks_per_node) * (config.checkpoint.keep_last + 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise LaunchError(
            f"{existing} has {free / GB:.1f} GB free; {config.checkpoint.keep_last + 1} checkpoints (checkpoint.keep_last and "
            f"the one being written) take about {needed / GB:.1f} GB; make space or choose another output_dir"
        )
    return (
        f"{config.run_dir}, {free / GB:,.0f} GB free (quotas are not seen), checkpoints take about {needed / GB:.1f} GB"
    )


def checkpoint_bytes(config: RunConfig, world_size: int) -> float:
    """Size of a checkpoint: fp32 master weights and optimizer states of all ranks."""
    stage1 = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 1})})
    needed = footprint(stage1, world_size)
    return (needed.optimizer + needed.host) * world_size


def _split(path: Path | str, config: RunConfig) -> str:
    if isinstance(path, str):
        return f"{path} is read from its store when the run starts"
    manifest_path = path if path.suffix == ".json" else path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text(encoding="utf-8"))
        shards = {str(shard["name"]): int(shard["bytes"]) for shard in manifest["shards"]}
        digests = {str(shard["name"]): str(shard["sha256"]) for shard in manifest["shards"] if "sha256" in shard}
        vocab_size, tokenizer, tokens = (
            int(manifest["vocab_size"]),
            str(manifest["tokenizer_sha256"]),
            int(manifest["tokens"]),
        )
    except OSError as error:
        raise LaunchError(
            f"{manifest_path} cannot be read: {error.strerror}; prepare the data with `hope data prepare`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"{manifest_path} is not a manifest of token shards ({error}); prepare the data again"
        ) from None
    for name, size in shards.items():
        shard = manifest_path.parent / name
        found = shard.stat().st_size if shard.is_file() else None
        if found != size:
            raise LaunchError(
                f"{shard} has {found} bytes, its manifest says {size}; copy it again, or prepare the data again"
            )
    if isinstance(config.data.tokenizer, Path) and tokenizer != _file_digest(config.data.tokenizer):
        raise LaunchError(
            f"{manifest_path} was made with another tokenizer than {config.data.tokenizer}; use the one beside the shards"
        )
    if vocab_size != config.model.vocab_size:
        raise LaunchError(
            f"{manifest_path} has a vocabulary of {vocab_size}, model.vocab_size={config.model.vocab_size}; make them equal"
        )
    checked = _digest_sample(manifest_path.parent, shards, digests)
    return f"{len(shards)} shards, {tokens:,} tokens, of their size and of this tokenizer; {checked} ({manifest_path})"


def _digest_sample(folder: Path, shards: dict[str, int], digests: dict[str, str]) -> str:
    """Digest shards, evenly spread, within a budget of bytes; training verifies each of them again before its first use."""
    names = sorted(digests)
    share = min(1.0, _DIGEST_BYTES / max(1, sum(shards[name] for name in names)))
    chosen = names if share == 1.0 else names[:: math.ceil(1 / share)]
    for name in chosen:
        if _file_digest(folder / name) != digests[name]:
            raise LaunchError(f"{folder / name} is corrupt: its SHA-256 is not the manifest's; copy it again")
    if not names:
        return "not digested: the manifest has no digests"
    odds = "" if share == 1.0 else f": one damaged shard shows with a chance of {len(chosen) / len(names):.0%}"
    return f"{len(chosen)} digested{odds}"


def _tokenizer(path: Path | str) -> str:
    if isinstance(path, str):
        return f"{path} is read from its store when the run starts"
    return f"{path}, SHA-256 {_file_digest(path)[:12]}"


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise LaunchError(
            f"{path} cannot be read: {error.strerror}; name the tokenizer that lies beside the shards"
        ) from None


def _partition(cluster: ClusterConfig, nodes: int) -> str:
    limits = slurm.show_partition(cluster.partition)
    if limits is None:
        names = slurm.partition_names()
        near = difflib.get_close_matches(cluster.partition or "", names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LaunchError(f"no partition {cluster.partition or '(default)'}; {hint}Slurm has {', '.join(names)}")
    name = limits["PartitionName"]
    if limits.get("State", "UP") != "UP":
        raise LaunchError(f"partition {name} is {limits['State']}; use another, or ask the administrators")
    max_time = limits.get("MaxTime", "UNLIMITED")
    if max_time != "UNLIMITED" and parse_time_limit(max_time) < cluster.time_limit_s:
        raise LaunchError(
            f"partition {name} allows {max_time}, time_limit={cluster.time_limit}; lower it: the run is requeued until it is done"
        )
    for key, what in (("MaxNodes", "allows"), ("TotalNodes", "has")):
        if limits.get(key, "").isdecimal() and int(limits[key]) < nodes:
            raise LaunchError(f"partition {name} {what} {limits[key]} nodes, --nodes {nodes}; use fewer")
    return f"{name}: up to {max_time}, {limits.get('TotalNodes', '?')} nodes"
