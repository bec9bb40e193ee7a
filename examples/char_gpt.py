"""A GPT over characters, in plain PyTorch, trained by M3 (in the manner of nanoGPT). No configuration, no Megatron-Core.

python examples/char_gpt.py                        attention, M3
python examples/char_gpt.py --mixer memory         HOPE's memories in the place of attention
python examples/char_gpt.py --optimizer adamw      torch's AdamW, to compare
python examples/char_gpt.py --text FILE --steps 2000 --dim 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_megatron import NeuralMemory
from hope_megatron.optim import M3, Muon


class Attention(nn.Module):
    """Causal softmax attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv.optim_fused_parts = (dim, dim, dim)  # three matrices for M3, not one
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, num_heads: int, mixer: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.mixer = NeuralMemory(dim, num_heads) if mixer == "memory" else Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norms[0](x))
        x = x + (y[0] if isinstance(y, tuple) else y)
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Logits [B, T, vocabulary] of tokens [B, T]."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, num_heads: int, block: int, mixer: str) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, dim), nn.Embedding(block, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, mixer) for _ in range(num_layers)))
        self.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        return self.lm_head(self.norm(self.blocks(x)))


def main(argv: list[str] | None = None) -> float:
    """Train, print the loss, return the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="any text (default: this file)")
    parser.add_argument("--mixer", choices=["attention", "memory"], default="attention")
    parser.add_argument("--optimizer", choices=["m3", "muon", "adamw"], default="m3")
    parser.add_argument("--lr", type=float, default=2e-2)
    for name, value in (("steps", 100), ("dim", 64), ("layers", 2), ("heads", 4), ("block", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    text = args.text.read_text(encoding="utf-8")
    letters = sorted(set(text))
    data = torch.tensor([letters.index(letter) for letter in text])
    model = GPT(len(letters), args.dim, args.layers, args.heads, args.block, args.mixer)
    if args.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr / 10)
    else:
        optimizer = {"m3": M3, "muon": Muon}[args.optimizer](model, lr=args.lr, vector_lr=args.lr / 2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(args.steps):
        starts = torch.randint(len(data) - args.block, (args.batch,))
        rows = torch.stack([data[start : start + args.block + 1] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
