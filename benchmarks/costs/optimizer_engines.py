"""Optimizer steps timed inside real ZeRO-1 engines, several optimizers taking turns so that the machine's moods hit all alike."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizer_counts import SLOW_PERIOD, Shape
from torch import nn

from hope_megatron.config.optim import OptimConfig
from hope_megatron.optim import build_optimizer

OPTIMIZERS = ("adamw", "muon", "adamuon", "m3", "deepspeed_muon", "dgd", "delta_momentum", "dmgd")
TIMEOUT_S = 600


class Parameters(nn.Module):
    """Parameters without a model. The loss has the random matrices `directions` as its gradient."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s.shape) * 0.02) for s in shapes)
        for p, s in zip(self.weights, shapes):
            p.optim_role, p.optim_fused_parts = s.tags.role, s.tags.fused_parts
            p.no_weight_decay = not s.tags.weight_decay  # makes a group, and so a vector, of its own

    def forward(self, directions: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(p * d).sum() for p, d in zip(self.weights, directions)]).sum()


class Team:
    """The ranks of one optimizer. Between steps they sleep."""

    def __init__(self, name: str, num_ranks: int, shapes: list[Shape]) -> None:
        self.name, self.num_ranks = name, num_ranks
        self.steps: list[dict[str, float]] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed"])  # imported once for all
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, num_ranks, self._folder.name, name, shapes, theirs)
            self._processes.append(context.Process(target=_rank_main, args=arguments, daemon=True))
            self._pipes.append(ours)
            self._processes[-1].start()
            theirs.close()

    def step(self, timed: bool = True) -> None:
        """One optimizer step on all ranks; the slowest counts."""
        ranks = self._ask("step")
        if timed:
            sums = {key: sum(rank[key] for rank in ranks) for key in ("cpu_s", "newton_schulz", "sent_bytes")}
            self.steps.append({"step_s": max(rank["step_s"] for rank in ranks), **sums})

    def finish(self) -> dict[str, Any]:
        """End the ranks: what they took."""
        ranks = self._ask("memory")
        self.close()
        times = [step["step_s"] for step in self.steps]
        return {
            "optimizer": self.name,
            "ranks": self.num_ranks,
            "steps": len(times),
            "median_step_s": statistics.median(times),
            "mean_step_s": statistics.mean(times),
            "worst_step_s": max(times),
            "cpu_s_per_step_all_ranks": statistics.mean(step["cpu_s"] for step in self.steps),
            "newton_schulz_runs": round(sum(step["newton_schulz"] for step in self.steps)),
            "sent_mb_per_step_all_ranks": statistics.mean(step["sent_bytes"] for step in self.steps) / 1e6,
            "state_mib_per_rank": max(rank["state_bytes"] for rank in ranks) / 2**20,
            "peak_rss_mib_per_rank": max(rank["peak_rss_kib"] for rank in ranks) / 2**10,
            "step_s": times,
        }

    def close(self) -> None:
        """End the ranks, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _ask(self, command: str) -> list[dict[str, float]]:
        for pipe in self._pipes:
            pipe.send(command)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(TIMEOUT_S):
                    raise RuntimeError(f"{self.name}: rank {rank} of {self.num_ranks} is silent for {TIMEOUT_S} s")
                answers.append(pipe.recv())
            except (EOFError, ConnectionError) as error:
                message = f"{self.name}: rank {rank} of {self.num_ranks} ended; see the messages above"
                raise RuntimeError(message) from error
        return answers


def measure(names: list[str], shapes: list[Shape], num_ranks: int, steps: int) -> list[dict[str, Any]]:
    """These optimizers step in turn: one untimed step each, then `steps` rounds."""
    teams: list[Team] = []
    try:
        for name in names:
            teams.append(Team(name, num_ranks, shapes))
        for i in range(1 + steps):
            for team in teams:
                team.step(timed=i > 0)
        return [team.finish() for team in teams]
    finally:
        for team in teams:
            team.close()


# ---- one rank -------------------------------------------------------------------------------------------------------


def _rank_main(rank: int, size: int, folder: str, name: str, shapes: list[Shape], pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if name == "deepspeed_muon":  # it takes four dimensions for a convolution and fails on stacks of stacks
        shapes = [replace(s, shape=(math.prod(s.shape[:-2]), *s.shape[-2:])) if len(s.shape) > 3 else s for s in shapes]
    engine = _engine(name, shapes)
    runs = _count_deepspeed_runs() if name == "deepspeed_muon" else None
    generator = torch.Generator().manual_seed(rank)
    directions = [torch.randn(s.shape, generator=generator) for s in shapes]
    while pipe.recv() == "step":
        pipe.send(_step(engine, directions, runs))
    state = engine.basic_optimizer.state.values()
    state_bytes = sum(v.nbytes for entry in state for v in entry.values() if isinstance(v, torch.Tensor))
    pipe.send({"state_bytes": state_bytes, "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    pipe.recv()  # until it is ended


def _step(engine: Any, directions: list[torch.Tensor], deepspeed_runs: list[int] | None) -> dict[str, float]:
    loss = engine(directions)
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    engine.backward(loss)
    engine.step()
    figures = {"step_s": time.perf_counter() - start, "cpu_s": time.process_time() - start_cpu}
    if deepspeed_runs is not None:
        figures |= {"newton_schulz": float(deepspeed_runs[0]), "sent_bytes": 0.0}
        deepspeed_runs[0] = 0
    else:
        stats = engine.basic_optimizer.last_step_stats()
        figures["newton_schulz"] = stats.get("optim/newton_schulz_calls", 0.0)
        figures["sent_bytes"] = stats.get("optim/exchange_bytes", 0.0)
    return figures


def _count_deepspeed_runs() -> list[int]:
    """A counter of the matrices that DeepSpeed's Muon orthogonalises on this rank."""
    from deepspeed.runtime.zero.muon import original_muon

    runs, muon_update = [0], original_muon.muon_update

    def counted(grad: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        runs[0] += math.prod(grad.shape[:-2])
        return muon_update(grad, *args, **kwargs)

    original_muon.muon_update = counted  # ZeRO imports it anew in every step
    return runs


def _engine(name: str, shapes: list[Shape]) -> Any:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = Parameters(shapes)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if name == "deepspeed_muon":
        # It picks its matrices itself: everything of two and more dimensions. torch's AdamW for the rest: no compiler needed.
        params = {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}
        config["optimizer"] = {"type": "Muon", "params": params}
        return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    settings = OptimConfig(name=name, slow_period_steps=SLOW_PERIOD)
    optimizer = build_optimizer(model.named_parameters(), settings)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    optimizer.bind_zero(engine.optimizer)
    return engine
