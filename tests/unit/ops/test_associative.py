"""ARMT's associative memory: the form over a segment equals the loop over tokens, and what it promises of keys and values."""

from __future__ import annotations

import torch

from hope_megatron.ops.associative import AssociativeState, features, num_features, read, write
from hope_megatron.ops.associative_loop import features_loop, read_loop, write_loop

B, T, M, H, K, V = 2, 5, 3, 2, 4, 3


def _inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=draw)  # noqa: E731
    q, k, v, beta = normal(B, T, H, K), normal(B, 2 * M, H, K), normal(B, 2 * M, H, V), normal(B, 2 * M, H).sigmoid()
    return [x.requires_grad_() for x in (q, k, v, beta)]


def _empty() -> AssociativeState:
    F = num_features(K)
    return AssociativeState(*(torch.zeros(shape, dtype=torch.float64) for shape in ((B, H, V, F), (B, H, F))))


def test_segments_equal_the_loop_over_tokens():
    """Two writes and a read: outputs, state and every gradient."""
    found = []
    for write_, read_ in ((write, read), (write_loop, read_loop)):
        q, k, v, beta = inputs = _inputs()
        state = _empty()
        for tokens in (slice(0, M), slice(M, 2 * M)):
            state = write_(k[:, tokens], v[:, tokens], beta[:, tokens], state)
        y = read_(q, state)
        loss = y.square().sum() + state.matrix.pow(3).sum() + state.counts.pow(2).sum()
        found.append((y, *state, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_features_by_hand():
    """[1, -2] -> r = [1, 0, 0, 2]; shifted by 1, 2 and 3 it meets itself at r_0 r_3 = 2 and, by 3, at r_3 r_0 = 2."""
    phi = features(torch.tensor([1.0, -2.0], dtype=torch.float64))
    by_hand = torch.zeros(12, dtype=torch.float64)
    by_hand[[0, 11]] = 2 / 8**0.5
    torch.testing.assert_close(phi, by_hand)
    torch.testing.assert_close(features_loop(torch.tensor([1.0, -2.0], dtype=torch.float64)), by_hand)


def test_a_key_that_is_written_again_gives_its_new_value_and_counts_once():
    key = torch.randn(B, 1, H, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    old, new = torch.ones(B, 1, H, V, dtype=torch.float64), torch.full((B, 1, H, V), 3.0, dtype=torch.float64)
    whole = torch.ones(B, 1, H, dtype=torch.float64)
    state = write(key, old, whole, _empty())
    again = write(key, new, whole, state)
    torch.testing.assert_close(read(key, state), old, rtol=1e-4, atol=0)
    torch.testing.assert_close(read(key, again), new, rtol=1e-4, atol=0)
    torch.testing.assert_close(again.counts, state.counts, rtol=1e-4, atol=1e-4)
