"""M3 and the deep optimizers written down literally for one process: whole matrices in lists, no plans. Slow and obvious."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hope_megatron.ops.newton_schulz import newton_schulz


def matrices_of(tensor: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    """Views of the matrices of a full parameter: fused parts, entries of a stack, or the parameter itself."""
    if parts:
        return list(tensor.split(list(parts)))
    return list(tensor.reshape(-1, *tensor.shape[-2:])) if tensor.ndim > 2 else [tensor]


class ReferenceM3:
    """`params`: name -> full tensor with .grad; `roles`, `parts`, `periods`, `phases`, `decays` by name; `changes` of periods."""

    def __init__(self, params, roles, parts, periods, phases, decays, cfg, changes):
        self.params, self.roles, self.parts = params, roles, parts
        self.periods, self.phases, self.decays, self.cfg = periods, phases, decays, cfg
        self.changes, self.waited, self.updates = changes, dict.fromkeys(params, 0), dict.fromkeys(params, 0)
        self.step_count = 0
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        self.m1, self.v, self.m2, self.o2, self.chunk, self.pending = (
            {k: z.clone() for k, z in zeros.items()} for _ in range(6)
        )

    @torch.no_grad()
    def step(self):
        self.step_count += 1
        for name, param in self.params.items():
            self.pending[name] += param.grad
            self.waited[name] += 1
            if self.waited[name] < self.periods[name]:
                continue
            self.waited[name] = 0
            self.updates[name] += 1
            grad = self.pending[name]
            self.pending[name] = torch.zeros_like(param)
            update = self._matrix if self.roles[name] == "matrix" else self._vector
            update(name, param, grad, self.updates[name])
            self.periods[name] = dict(self.changes[name]).get(self.step_count, self.periods[name])

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


class ReferenceDeep(ReferenceM3):
    """DGD, Delta Momentum and DMGD with identities written out and inner gradients by hand; vectors and clocks are the same."""

    def _matrix(self, name, param, grad, t):
        steps = self.periods[name] if self._grows else 1
        param -= self.cfg.lr * self.decays[name] * steps * param
        states = (self.m1, self.m2, self.o2)
        whole = [param, grad, *(state[name] for state in states)]
        for p, g, *memories in zip(*(matrices_of(x, self.parts[name]) for x in whole)):
            p -= self.cfg.lr * getattr(self, "_" + self.cfg.name)(p, g, *memories, steps)

    @property
    def _grows(self):
        return self.cfg.form == "paper" and self.cfg.name != "dmgd" and self.cfg.momentum_output == "identity"

    def _dgd(self, p, g, m1, m2, o2, steps):
        cfg, key = self.cfg, g / g.norm()
        m1.copy_(cfg.momentum * m1 + (1 - cfg.momentum) * g)
        s = cfg.momentum * m1 + (1 - cfg.momentum) * g if cfg.nesterov else m1
        return (s if cfg.form == "paper" else _matched(s)) + cfg.delta * steps * p @ (key.T @ key)

    def _delta_momentum(self, p, g, m1, m2, o2, steps):
        cfg, paper = self.cfg, self.cfg.form == "paper"
        key, write = (g, 1.0) if paper else (g / g.norm(), 1 - cfg.momentum)
        m1.copy_(m1 @ (cfg.momentum * torch.eye(len(g.T)) - cfg.delta * key.T @ key) + write * g)
        return self._output(m1) if paper else _matched(self._output(m1))

    def _dmgd(self, p, g, m1, m2, o2, steps):
        if len(g) > len(g.T):
            return self._dmgd(p.T, g.T, m1.T, m2.T, o2.T, steps).T
        (rows, cols), cfg, inner, outer = g.shape, self.cfg, m2, o2
        basis = torch.tensor(
            [[2**0.5 * math.cos(math.pi / cols * (i + 0.5) * (j + 0.5)) for j in range(cols)] for i in range(rows)]
        )
        u = g / g.norm() * rows**0.5
        z = u @ (basis + inner).T
        a, slope = z * z.sigmoid(), z.sigmoid() * (1 + z * (1 - z.sigmoid()))
        norm = a.norm(dim=1, keepdim=True)
        h = a / norm
        error = (h @ outer + u if cfg.inner_objective == "l2" else u) / rows
        dh = error @ outer.T
        dz = (dh - h * (h * dh).sum(1, keepdim=True)) / norm * slope
        inner.copy_(cfg.inner_decay * inner - cfg.inner_lr * dz.T @ u)
        outer.copy_(cfg.inner_decay * outer - cfg.inner_lr * h.T @ error)
        a = u @ (basis + inner).T
        a = a * a.sigmoid()
        return _matched(self._output(-(a / a.norm(dim=1, keepdim=True)) @ outer))

    def _output(self, matrix):
        return self._orthogonal(matrix) if self.cfg.momentum_output == "newton_schulz" else matrix


def _matched(update):
    return 0.2 * update / update.square().mean().sqrt()
