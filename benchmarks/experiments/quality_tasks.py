"""The tasks on which optimizers are compared: a language model on the quickstart corpus, vision transformers on digits and glyphs.

A task trains one *cell* (an optimizer with its settings, a learning rate, a seed) and returns its figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality_glyphs import LETTERS, Labelled, glyphs
from torch import Tensor, nn

from data_pipeline import TokenStream, iterate_texts, load_tokenizer, train_tokenizer
from data_pipeline.prepare import prepare
from hope_megatron.config.load import load_model_config
from hope_megatron.config.optim import OptimConfig
from hope_megatron.model import build_model
from hope_megatron.optim import apply_lr, build_optimizer, lr_at

CORPUS = ["python-stdlib"]
HELD_OUT_FRACTION = 0.05
# Where the quickstart's model differs from the presets: two layers of half the width.
SMALL = ["vocab_size=1024", "num_layers=2", "hidden_size=128", "num_heads=2"]
LEVELS = {
    "hope_tiny": "cms.levels=[{hidden_size: 256}, {hidden_size: 256, update_period_steps: 4}]",
    "transformer_pp_tiny": "cms.levels=[{hidden_size: 704}]",
}


@dataclass(frozen=True)
class Budget:
    """How long a cell trains, and on how much at once."""

    steps: int
    batch: int
    seq_length: int
    """Tokens per sequence (language models)."""
    eval_samples: int
    """Held-out sequences (language models)."""


def fit(
    model: nn.Module, optim: OptimConfig, budget: Budget, batch_loss: Callable[[int], Tensor]
) -> tuple[list[float], float]:
    """Train for the whole budget. Returns the loss of every step, up to the first that is not finite, and seconds per step."""
    optimizer = build_optimizer(model.named_parameters(), optim)
    schedule = SimpleNamespace(**optim.model_dump(), total_steps=budget.steps)
    losses: list[float] = []
    started = time.process_time()
    for step in range(budget.steps):
        loss = batch_loss(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        apply_lr(optimizer, lr_at(step, schedule))
        optimizer.step()
        optimizer.zero_grad()
    return losses, (time.process_time() - started) / len(losses)


class LanguageModel:
    """Next-token prediction on Python's own standard library, as `hope quickstart` prepares it."""

    unit = "test loss, nats per token"

    def __init__(self, preset: str, data: Path, budget: Budget, device: torch.device) -> None:
        self.budget, self.device = budget, device
        self.config = load_model_config(preset, [*SMALL, LEVELS[preset]])
        self._data = prepared_corpus(data, self.config.vocab_size)

    def run(self, optim: OptimConfig, seed: int) -> dict[str, Any]:
        """Train one model; seed decides its initial weights and the order of the data."""
        model = build_model(self.config, seed=seed).to(self.device)
        stream = TokenStream(self._data / "train", self.budget.seq_length, seed)
        batch = self.budget.batch

        def batch_loss(step: int) -> Tensor:
            return model(*self._tensors(stream, range(step * batch, (step + 1) * batch))).losses.mean()

        losses, seconds = fit(model, optim, self.budget, batch_loss)
        parameters = sum(p.numel() for p in model.parameters())
        return {"train": losses, "step_s": seconds, "parameters": parameters, **self._score(model, losses)}

    @torch.no_grad()
    def _score(self, model: nn.Module, losses: list[float]) -> dict[str, Any]:
        """Every second held-out sequence is validation, the others are the test."""
        if not math.isfinite(losses[-1]):
            return {"validation": None, "loss": None}
        stream = TokenStream(self._data / "heldout", self.budget.seq_length, shuffle=False)
        numbers = np.arange(min(self.budget.eval_samples, stream.num_samples))
        found = [
            [model(*self._tensors(stream, part)).losses.flatten() for part in np.array_split(half, 4)]
            for half in (numbers[::2], numbers[1::2])
        ]
        validation, test = (_finite(torch.cat(parts).mean()) for parts in found)
        return {"validation": validation, "loss": test}

    def _tensors(self, stream: TokenStream, numbers: range | np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(np.stack([stream.sample(int(number)) for number in numbers])).to(self.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prepared_corpus(directory: Path, vocab_size: int) -> Path:
    """Tokenizer and shards of the corpus, made if they are not there yet; an interrupted preparation continues."""
    path = directory / "tokenizer.model"
    tokenizer = load_tokenizer(path) if path.exists() else train_tokenizer(iterate_texts(CORPUS), path, vocab_size)
    if not (directory / "heldout/manifest.json").exists():
        prepare(CORPUS, tokenizer, directory, held_out_fraction=HELD_OUT_FRACTION)
    return directory


def digits() -> tuple[Labelled, Labelled]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, (training, held out)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(found.images).float()[order] / 8 - 1, torch.from_numpy(found.target).long()[order]
    cut = len(labels) // 5
    return (images[cut:], labels[cut:]), (images[:cut], labels[:cut])


class Images:
    """Classification of small images by a small vision transformer of 16 or 64 patches."""

    unit = "test loss, nats per image"

    def __init__(self, name: str, budget: Budget, device: torch.device) -> None:
        self.budget, self.device = budget, device
        sets = digits() if name == "digits" else glyphs()
        self.train, self.heldout = (tuple(part.to(device) for part in of) for of in sets)
        self._model = (8, 2, 10) if name == "digits" else (32, 4, len(LETTERS))

    def run(self, optim: OptimConfig, seed: int) -> dict[str, Any]:
        """Train one model; seed decides its initial weights and the order of the images."""
        torch.manual_seed(seed)
        model = VisionTransformer(*self._model).to(self.device)
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.train

        def batch_loss(step: int) -> Tensor:
            picked = torch.randint(len(labels), (self.budget.batch,), generator=generator).to(self.device)
            return F.cross_entropy(model(images[picked]), labels[picked])

        losses, seconds = fit(model, optim, self.budget, batch_loss)
        parameters = sum(p.numel() for p in model.parameters())
        return {"train": losses, "step_s": seconds, "parameters": parameters, **self._score(model, losses)}

    @torch.no_grad()
    def _score(self, model: nn.Module, losses: list[float]) -> dict[str, Any]:
        """Every second held-out image is validation, the others are the test."""
        if not math.isfinite(losses[-1]):
            return {"validation": None, "loss": None, "accuracy": None}
        images, labels = self.heldout
        logits, test = model(images), slice(1, None, 2)
        return {
            "validation": _finite(F.cross_entropy(logits[::2], labels[::2])),
            "loss": _finite(F.cross_entropy(logits[test], labels[test])),
            "accuracy": float((logits[test].argmax(1) == labels[test]).float().mean()),
        }


class VisionTransformer(nn.Module):
    """Square patches, width 64, pre-norm blocks, mean over patches. [B, size, size] -> logits [B, classes]."""

    def __init__(
        self, size: int, patch: int, classes: int, *, width: int = 64, depth: int = 3, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(patch**2, width)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        # As in the language models: what touches the input and the classes takes AdamW.
        for param in (self.patches.weight, self.positions, self.head.weight):
            param.optim_role = "vector"  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images.unsqueeze(1), kernel_size=self.patch, stride=self.patch).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.patches(patches) + self.positions)).mean(1))


class Block(nn.Module):
    """Attention and MLP with residuals: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.weight.optim_fused_parts = (width,) * 3  # type: ignore[attr-defined]
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def _finite(loss: Tensor) -> float | None:
    return float(loss) if torch.isfinite(loss) else None
