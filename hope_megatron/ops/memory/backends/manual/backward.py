"""The backward of forward.py: every line of its forward in reverse order. `d_x` is the gradient of x."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.manual.forward import Tape, by_head, inverses
from hope_megatron.ops.memory.layout import Weights
from hope_megatron.ops.memory.rule import MemoryRule

_silu_backward = torch.ops.aten.silu_backward


class ChunkBackward:
    """Walks one chunk backwards; gradients accumulate in attributes named like the tape's fields. `run` is called once.

    anchor: what retention forgets towards, None: zero. d_anchor: its gradient, to which this chunk's is added in place.
    """

    def __init__(self, tape: Tape, anchor: Weights | None, d_anchor: Weights | None, rule: MemoryRule):
        self.tape, self.anchor, self.d_anchor, self.rule = tape, anchor, d_anchor, rule
        self.N, self.C = tape.log_alpha.shape
        self.erase_gamma = tape.eta * tape.gamma_prev
        self.writes_in = tape.rows_in is not None

    def run(self, d_y: Tensor, d_w_end: Weights) -> tuple[tuple[Tensor, ...], Weights]:
        """Gradients of q, x_k, x_v [N, C, d] and of the two logits [N, C], and of the weights at the chunk's start."""
        self._end(d_w_end)
        self._read(d_y)
        self._solve()
        self._rows()
        self._hidden_layers()
        self._targets_and_features()
        self._rates()
        return self._inputs(), Weights(self.d_w_in, self.d_w_vector, self.d_w_scalar)

    def _end(self, d: Weights) -> None:
        t, N = self.tape, self.N
        self.d_Gamma_end, self.d_gamma_end = torch.zeros_like(t.log_alpha), torch.zeros_like(t.log_alpha[:, 0])
        if self.writes_in:
            self.d_w_in, self.d_rows_in, self.d_k_n = self._end_of(d.w_in, t.w.w_in, t.rows_in, t.k_n)
        else:
            self.d_w_in, self.d_k_n = d.w_in.clone(), torch.zeros_like(t.k_n)
        self.d_keys = torch.empty_like(t.keys)
        keys, d_keys = (t.keys[: 3 * N], t.keys[3 * N :]), (self.d_keys[: 3 * N], self.d_keys[3 * N :])
        self.d_w_vector, self.d_rows_vector, _ = self._end_of(
            d.w_vector, t.w.w_vector, t.rows_vector, keys[0], out=d_keys[0]
        )
        self.d_w_scalar, self.d_rows_scalar, _ = self._end_of(
            d.w_scalar, t.w.w_scalar, t.rows_scalar, keys[1], out=d_keys[1]
        )
        if self.anchor is not None:
            layers = list(zip(self.anchor, self.d_anchor, d))  # input layers come first
            for a, d_a, d_layer in layers if self.writes_in else layers[1:]:
                by_head(d_a, N).addcmul_(by_head(d_layer.contiguous(), N), 1 - t.gamma[:, -1:])
                self.d_gamma_end -= _dots(d_layer, a, N)

    def _end_of(self, d: Tensor, w: Tensor, rows: Tensor, keys: Tensor, *, out=None):
        """W_C = gamma_C W_0 - (Gamma_C rows)^T keys: gradients of W_0, of the rows and of the keys."""
        t, N = self.tape, self.N
        reach, gamma_end = -t.Gamma[:, -1, :, None], t.gamma[:, -1:]
        back = by_head(torch.bmm(keys, d.mT), N)
        self.d_Gamma_end -= (back * by_head(rows, N)).sum((0, -1))
        self.d_gamma_end += _dots(d, w, N)
        reached = (by_head(rows, N) * reach).flatten(0, 1)
        d_w = (by_head(d.contiguous(), N) * gamma_end).flatten(0, 1)
        return d_w, back.mul_(reach).flatten(0, 1), torch.bmm(reached, d, out=out)

    def _read(self, d_y: Tensor) -> None:
        t, N = self.tape, self.N
        gamma = t.gamma
        d_held_q = gamma * d_y
        d_gamma = (d_y * t.held_q).sum(-1)
        d_phi_q, d_keys = torch.bmm(d_held_q, t.w.w_vector[:N]), self.d_keys[:N]
        self.d_w_vector[:N].baddbmm_(d_held_q.mT, t.phi_q)
        d_scores, self.d_Gamma = self._decayed(d_y, t.rows_vector[:N], t.scores_out, self.d_rows_vector[:N])
        d_phi_q.baddbmm_(d_scores, t.keys[:N])
        d_keys.baddbmm_(d_scores.mT, t.phi_q)
        if self.anchor is not None:
            d_initial = d_y - d_held_q
            d_gamma -= (d_y * t.initial_q).sum(-1)
            d_phi_q.baddbmm_(d_initial, self.anchor.w_vector[:N])
            self.d_anchor.w_vector[:N].baddbmm_(d_initial.mT, t.phi_q)

        self.d_gamma = d_gamma
        self.d_z_x = torch.empty_like(t.z_x)
        self._read_hidden(_silu_backward(d_phi_q, t.hidden))
        if self.rule.read_skip:
            self.d_q += d_y

    def _read_hidden(self, d_hidden: Tensor) -> None:
        """Of what the input layer of M_mem made of the queries."""
        t, N, gamma = self.tape, self.N, self.tape.gamma
        if not self.writes_in:
            self.d_z_x[:N] = d_hidden
            self.d_q, self.d_k = torch.zeros_like(t.x[:N]), torch.zeros_like(t.x[:N])
            return
        torch.mul(gamma, d_hidden, out=self.d_z_x[:N])
        self.d_gamma += (d_hidden * t.z_x[:N]).sum(-1)
        d_scores, d_Gamma = self._decayed(d_hidden, t.rows_in[:N], t.scores, self.d_rows_in[:N])
        self.d_Gamma += d_Gamma
        self.d_q = torch.bmm(d_scores, t.kv[:N])
        if self.anchor is not None:
            d_initial = d_hidden - self.d_z_x[:N]
            self.d_gamma -= (d_hidden * t.initial_x).sum(-1)
            self.d_q.baddbmm_(d_initial, self.anchor.w_in[:N])
            self.d_anchor.w_in[:N].baddbmm_(d_initial.mT, t.x[:N])
        self.d_k = torch.bmm(d_scores.mT, t.x[:N])

    def _decayed(self, d: Tensor, rows: Tensor, scores: Tensor, d_rows: Tensor) -> tuple[Tensor, Tensor]:
        """y = -(Gamma scores) rows: gradients of scores and Gamma; that of the rows is added to `d_rows`."""
        d_rows.baddbmm_((self.tape.Gamma * scores).mT, d, alpha=-1)
        d_decayed = torch.bmm(d, rows.mT).neg_()
        d_Gamma = d_decayed * scores
        return d_decayed.mul_(self.tape.Gamma), d_Gamma

    def _solve(self) -> None:
        """rows = (I + L)^-1 r: d_r = (I + L)^-T d_rows, d_L = -d_r rows^T, and L = eta Gamma_prev grams."""
        t, N = self.tape, self.N
        first, vector, scalar = inverses(t.inverse, N)
        self.d_r_vector = torch.bmm(vector.mT, self.d_rows_vector)
        self.d_r_scalar = torch.bmm(scalar.mT, self.d_rows_scalar)
        d_system = torch.empty_like(t.grams)
        if self.writes_in:
            self.d_r_in = torch.bmm(first.mT, self.d_rows_in)
            torch.sum(by_head(torch.bmm(self.d_r_in, t.rows_in.mT), N), 0, out=d_system[:N])
        torch.bmm(self.d_r_vector, t.rows_vector.mT, out=d_system[-5 * N : -2 * N])
        torch.bmm(self.d_r_scalar, t.rows_scalar.mT, out=d_system[-2 * N :])
        d_system = by_head(d_system, N)
        d_decay = (d_system * by_head(t.grams, N)).sum(0).neg_()
        d_grams = d_system.mul_(-t.eta * t.Gamma_prev).flatten(0, 1)
        d_grams = d_grams + d_grams.mT
        if self.writes_in:
            self.d_k.baddbmm_(d_grams[:N], t.kv[:N])
        self.d_keys.baddbmm_(d_grams[-5 * N :], t.keys)
        self.d_eta = (d_decay * t.Gamma_prev).sum(-1)
        self.d_Gamma_prev = d_decay.mul_(t.eta)

    def _rows(self) -> None:
        """r = eta gradient + erase_gamma held + erase_lost initial, of the three kinds of layer."""
        t, N = self.tape, self.N
        self.d_erase_gamma = torch.zeros_like(self.d_eta)
        if self.anchor is not None:
            self._initial_rows()

        def layer(d_r: Tensor, gradient: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
            d_r = by_head(d_r, N)
            self.d_eta += (d_r * by_head(gradient, N)).sum((0, -1))
            self.d_erase_gamma += (d_r * by_head(held, N)).sum((0, -1))
            return (d_r * t.eta).flatten(0, 1), (d_r * self.erase_gamma).flatten(0, 1)

        self.d_z_k = torch.zeros_like(t.z_k)
        if self.writes_in:
            self.d_drive, self.d_z_k = layer(self.d_r_in, t.drive, t.z_k)
        self.d_error, self.d_held = layer(self.d_r_vector, t.error, t.held)
        self.d_error_scalar, self.d_held_scalar = layer(self.d_r_scalar, t.error_scalar, t.held_scalar)

    def _initial_rows(self) -> None:
        """What the anchor adds to r: erase_lost = eta (1 - gamma_prev) times A keys."""
        t, N, n = self.tape, self.N, 3 * self.N
        erase_lost, self.d_erase_lost = t.eta - self.erase_gamma, torch.zeros_like(self.d_eta)

        def layer(d_r: Tensor, initial: Tensor, d_anchor: Tensor, keys: Tensor) -> Tensor:
            d_r = by_head(d_r, N)
            self.d_erase_lost += (d_r * by_head(initial, N)).sum((0, -1))
            d_initial = (d_r * erase_lost).flatten(0, 1)
            d_anchor.baddbmm_(d_initial.mT, keys)
            return d_initial

        if self.writes_in:
            d_initial = layer(self.d_r_in, t.initial_in, self.d_anchor.w_in, t.k_n)
            self.d_k_n.baddbmm_(d_initial, self.anchor.w_in)
        d_initial = layer(self.d_r_vector, t.initial_vector, self.d_anchor.w_vector, t.keys[:n])
        self.d_keys[:n].baddbmm_(d_initial, self.anchor.w_vector)
        d_initial = layer(self.d_r_scalar, t.initial_scalar, self.d_anchor.w_scalar, t.keys[n:])
        self.d_keys[n:].addcmul_(d_initial, self.anchor.w_scalar)

    def _hidden_layers(self) -> None:
        """drive = delta silu'(z_k); delta = W^T error; held = W keys."""
        t, n, w = self.tape, 3 * self.N, self.tape.w
        if self.writes_in:
            d_delta = _silu_backward(self.d_drive, t.z_k)
            self.d_z_k.addcmul_(self.d_drive.mul_(t.delta), _second_derivative(t.z_k))
            self.d_error.baddbmm_(d_delta[:n], w.w_vector.mT)
            self.d_error_scalar.baddbmm_(d_delta[n:], w.w_scalar.mT)
            self.d_w_vector.baddbmm_(t.error.mT, d_delta[:n])
            self.d_w_scalar.baddbmm_(t.error_scalar.mT, d_delta[n:])
        self.d_keys[:n].baddbmm_(self.d_held, w.w_vector)
        self.d_keys[n:].addcmul_(self.d_held_scalar, w.w_scalar)
        self.d_w_vector.baddbmm_(self.d_held.mT, t.keys[:n])
        self.d_w_scalar.baddbmm_(self.d_held_scalar.mT, t.keys[n:])

    def _targets_and_features(self) -> None:
        """error = k - unit(v + W phi_v), or without k; keys = unit(silu(z_k)): down to keys and values."""
        t, N, n, w = self.tape, self.N, 3 * self.N, self.tape.w
        if self.rule.dot_target == "residual":
            self.d_k += by_head(self.d_error, N).sum(0)
        d_target = _unit_backward(self.d_error, t.target, t.target_scale).neg_()
        d_scalar = self.d_error_scalar.mul_(t.error_scalar.square().sub_(1))
        d_phi_v = torch.empty_like(t.phi_v)
        torch.bmm(d_target, w.w_vector, out=d_phi_v[:n])
        torch.mul(d_scalar, w.w_scalar, out=d_phi_v[n:])
        self.d_w_vector.baddbmm_(d_target.mT, t.phi_v[:n])
        self.d_w_scalar.baddbmm_(d_scalar.mT, t.phi_v[n:])

        d_z_v = _silu_backward(d_phi_v, t.z_v)
        self.d_z_k += _silu_backward(_unit_backward(self.d_keys, t.keys, t.keys_scale), t.z_k)
        self.d_w_in.baddbmm_(self.d_z_k.mT, t.k_n).baddbmm_(d_z_v.mT, t.v_n)
        self.d_k_n.baddbmm_(self.d_z_k, w.w_in)
        d_v_n = torch.bmm(d_z_v, w.w_in)
        d_v_n[:n] += d_target
        d_kv = torch.cat([self.d_k.add_(by_head(self.d_k_n, N).sum(0)), by_head(d_v_n, N).sum(0)])
        self.d_raw = _unit_backward(d_kv, t.kv, t.kv_scale)

    def _rates(self) -> None:
        """eta, and the decays down to log alpha: gradients of the two logits, [2 N, C, 1]."""
        t, eta, gamma = self.tape, self.tape.eta.squeeze(-1), self.tape.gamma.squeeze(-1)
        d_eta = self.d_eta.addcmul_(self.d_erase_gamma, t.gamma_prev.squeeze(-1))
        d_gamma, d_Gamma = self.d_gamma, self.d_Gamma
        if self.anchor is not None:
            d_eta.addcmul_(self.d_erase_lost, 1 - t.gamma_prev.squeeze(-1))
            self.d_erase_gamma -= self.d_erase_lost
        d_gamma[:, :-1] += (self.d_erase_gamma * eta)[:, 1:]
        d_gamma[:, -1] += self.d_gamma_end
        d_Gamma[:, :-1] += self.d_Gamma_prev[:, 1:]
        d_Gamma[:, -1] += self.d_Gamma_end
        d_Gamma *= t.Gamma
        d_total = d_Gamma.sum(-1).sub_(d_Gamma.sum(-2)).addcmul_(d_gamma, gamma)
        d_log_alpha = d_total.flip(-1).cumsum(-1).flip(-1)
        d_eta_logit = d_eta * eta * (1 - eta / self.rule.eta_max)
        self.d_logits = torch.cat([d_eta_logit, -d_log_alpha * torch.expm1(t.log_alpha)]).unsqueeze(-1)

    def _inputs(self) -> tuple[Tensor, ...]:
        """What the memories made of the inputs; returns the gradients of q, x_k, x_v and of the logits."""
        t, N, w = self.tape, self.N, self.tape.w
        d_phi_x = torch.empty_like(t.phi_x)
        torch.bmm(self.d_raw, w.w_vector[N:], out=d_phi_x[: 2 * N])
        torch.mul(self.d_logits, w.w_scalar, out=d_phi_x[2 * N :])
        self.d_w_vector[N:].baddbmm_(self.d_raw.mT, t.phi_x[: 2 * N])
        self.d_w_scalar.baddbmm_(self.d_logits.mT, t.phi_x[2 * N :])
        self.d_z_x[N:] = _silu_backward(d_phi_x, t.z_x[N:])
        self.d_w_in.baddbmm_(self.d_z_x.mT, t.x)
        d_x = torch.bmm(self.d_z_x, w.w_in)
        d_x[N : 3 * N] += self.d_raw
        d_q, d_k, d_v, d_k_eta, d_k_alpha = by_head(d_x, N)
        d_logits = self.d_logits.squeeze(-1)
        return d_q.add_(self.d_q), d_k.add_(d_k_eta).add_(d_k_alpha), d_v, d_logits[:N], d_logits[N:]


def _dots(a: Tensor, b: Tensor, N: int) -> Tensor:
    """Inner product of two stacks of matrices, summed over the memories: [n N, ., .] -> [N]."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1, N).sum(0)


def _unit_backward(d: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Gradient of x for y = unit(x) = x scale."""
    return torch.addcmul(d, y, (y * d).sum(-1, keepdim=True), value=-1).mul_(scale)


def _second_derivative(z: Tensor) -> Tensor:
    """That of SiLU."""
    s = torch.sigmoid(z)
    return (1 - 2 * s).mul_(z).add_(2).mul_(s).mul_(1 - s)
