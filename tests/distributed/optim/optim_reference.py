"""M3 written down literally for one process: whole matrices in lists, separate buffers, no plans. Slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.newton_schulz import newton_schulz


def matrices_of(tensor: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    """Views of the matrices of a full parameter: fused parts, entries of a stack, or the parameter itself."""
    if parts:
        return list(tensor.split(list(parts)))
    return list(tensor.reshape(-1, *tensor.shape[-2:])) if tensor.ndim > 2 else [tensor]


class ReferenceM3:
    """`params`: name -> full tensor with .grad; `roles`, `parts`, `periods`, `phases`, `decays` by name."""

    def __init__(self, params, roles, parts, periods, phases, decays, cfg):
        self.params, self.roles, self.parts = params, roles, parts
        self.periods, self.phases, self.decays, self.cfg = periods, phases, decays, cfg
        self.step_count = 0
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        self.m1, self.v, self.m2, self.o2, self.chunk, self.pending = (
            {k: z.clone() for k, z in zeros.items()} for _ in range(6)
        )

    @torch.no_grad()
    def step(self):
        self.step_count += 1
        for name, param in self.params.items():
            period = self.periods[name]
            self.pending[name] += param.grad
            if self.step_count % period:
                continue
            grad = self.pending[name]
            self.pending[name] = torch.zeros_like(param)
            update = self._matrix if self.roles[name] == "matrix" else self._vector
            update(name, param, grad, self.step_count // period)

    def _vector(self, name, param, grad, t):
        cfg, (b1, b2) = self.cfg, self.cfg.betas
        param -= cfg.lr * self.decays[name] * param
        self.m1[name] = b1 * self.m1[name] + (1 - b1) * grad
        self.v[name] = b2 * self.v[name] + (1 - b2) * grad * grad
        param -= cfg.lr * (self.m1[name] / (1 - b1**t)) / ((self.v[name] / (1 - b2**t)).sqrt() + cfg.eps)

    def _matrix(self, name, param, grad, t):
        cfg, (b1, b2), b3, f = self.cfg, self.cfg.betas, self.cfg.slow_beta, self.cfg.slow_period_steps
        param -= cfg.lr * self.decays[name] * param
        paper = cfg.form == "paper"
        self.chunk[name] += grad
        if paper:
            self.m1[name] = self.m1[name] + b1 * grad
            self.v[name] = self.v[name] + b2 * grad * grad
        else:
            self.m1[name] = b1 * self.m1[name] + (1 - b1) * grad
            self.v[name] = b2 * self.v[name] + (1 - b2) * grad * grad
        for p, m1, o2, v in zip(
            *(matrices_of(x[name], self.parts[name]) for x in (self.params, self.m1, self.o2, self.v))
        ):
            direction = self._orthogonal(m1) + cfg.slow_weight * o2
            if paper:
                p -= cfg.lr * direction / (v.sqrt() + cfg.eps)
            else:
                update = direction / (v.sqrt() + 0.1 * v.mean().sqrt())
                p -= cfg.lr * 0.2 * update / update.square().mean().sqrt()
        if (t + self.phases[name]) % f == 0:
            if paper:
                self.m2[name] = self.m2[name] + b3 * self.chunk[name]
            else:
                self.m2[name] = b3 * self.m2[name] + (1 - b3) * self.chunk[name] / f
            self.chunk[name] = torch.zeros_like(param)
            for m2, o2 in zip(
                matrices_of(self.m2[name], self.parts[name]), matrices_of(self.o2[name], self.parts[name])
            ):
                o2.copy_(self._orthogonal(m2))

    def _orthogonal(self, matrix):
        return newton_schulz(matrix, steps=self.cfg.ns_steps, coefficients=self.cfg.ns_coefficients, form="direct")
