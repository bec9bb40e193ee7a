"""Training a small model in this process, and asking it what it has learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from hope_megatron.config.model import ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.engine.distributed import init_distributed
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.optim.schedule import apply_lr, lr_at
from hope_megatron.suites.streamed import streamed_answers
from hope_megatron.suites.suite import SuiteOptions
from hope_megatron.suites.task import IGNORE, Batch, Task

_CHECK_EVERY = 50  # steps between looks at whether a task is solved
TEST_SEQUENCES = 128
_GRAD_CLIP = 1.0
_PIECE_TOKENS = 1024
_LR = {"adamw": 3e-3, "m3": 1e-2, "muon": 1e-2}


@dataclass(frozen=True)
class FitOptions:
    """How a model is trained: the same for every family of a table."""

    steps: int
    batch_size: int = 32
    lr: float = 3e-3
    optimizer: str = "adamw"


def fit_options(options: SuiteOptions, steps: int, *, batch_size: int = 32, optimizer: str = "adamw") -> FitOptions:
    """What the user chose, else the suite's own steps and optimizer; every optimizer comes with its rate."""
    name = options.optimizer or optimizer
    return FitOptions(options.steps or steps, batch_size, options.lr or _LR[name], name)


def fit(
    model: LanguageModel,
    batches: Callable[[int], Batch],
    options: FitOptions,
    *,
    solved: Callable[[int], bool] = lambda steps: False,
    penalty: Callable[[], Tensor] | None = None,
) -> int:
    """Train on the mean loss of the answers; returns the number of steps made.

    Warm-up over a tenth of the steps (at most 100), then cosine to a tenth; gradients clipped to norm 1.

    Args:
        batches: from the step to its batch.
        solved: asked every 50 steps, with the steps made; True ends the training.
        penalty: added to the loss of every step.
    """
    optim = OptimConfig.model_validate(dict(name=options.optimizer, lr=options.lr, weight_decay=0.01))
    optimizer = build_optimizer(model.named_parameters(), optim)
    warmup = min(100, options.steps // 10)
    schedule = SimpleNamespace(schedule="cosine", warmup_steps=warmup, total_steps=options.steps, min_lr_ratio=0.1)
    model.train()
    for step in range(options.steps):
        apply_lr(optimizer, lr_at(step, schedule))
        loss = batch_loss(model, batches(step))
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % _CHECK_EVERY == 0 and solved(step + 1):
            return step + 1
    return options.steps


def small_model(config: ModelConfig, seed: int) -> LanguageModel:
    """Fresh weights on this process's device. Joins a world of one process if there is none."""
    mesh = init_distributed(ParallelConfig(), num_threads=torch.get_num_threads())
    return build_model(config, seed=seed).to(mesh.device)


def batch_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats per answer."""
    tokens, targets = on_device(model, batch)
    return model(tokens, targets).losses.sum() / (targets != IGNORE).sum()


def on_device(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens and targets as tensors where the model is."""
    device = next(model.parameters()).device
    return torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)


@torch.no_grad()
def score(model: LanguageModel, task: Task, bin_name: str, sequences: int = TEST_SEQUENCES) -> float:
    """What the task's metric says in a bin. Long sequences are read in pieces."""
    batch = task.test_batch(bin_name, sequences)
    if task.metric == "loss":
        return batch_loss(model, batch).item()
    answers = streamed_answers(model, *on_device(model, batch), piece=_PIECE_TOKENS)
    if task.metric == "sequences":
        return (answers.right == answers.asked).float().mean().item()
    return (answers.right.sum() / answers.asked.sum()).item()


def fit_task(
    config: ModelConfig, task: Task, options: FitOptions, seed: int, *, test_sequences: int = TEST_SEQUENCES
) -> tuple[LanguageModel, int]:
    """Train a fresh model on a task, until the trained bin and the next are answered without a mistake, or the steps are over."""
    model, lessons = small_model(config, seed), _Lessons(task, options.steps)

    def solved(steps: int) -> bool:
        if lessons.left:
            lessons.look(steps, score(model, task, lessons.left[0], test_sequences))
            return False
        return task.metric != "loss" and all(score(model, task, name, test_sequences) == 1.0 for name in task.bins[:2])

    def batch(step: int) -> Batch:
        return task.train_batch(options.batch_size, seed, step, lessons.left[0] if lessons.left else None)

    return model, fit(model, batch, options, solved=solved)


class _Lessons:
    """The lessons of a task that are still to be learnt. Each ends when it is known, at the latest after a share of the steps."""

    def __init__(self, task: Task, steps: int):
        self.left, self._began = list(task.lessons), 0
        self._known, self._longest = task.known, int(steps * task.longest_lesson)

    def look(self, steps: int, reached: float) -> None:
        """After some steps of training the first lesson left is answered with a score."""
        if reached >= self._known or steps - self._began >= self._longest:
            self.left.pop(0)
            self._began = steps
