"""Each filter does what its paper says, judged by the distribution that comes out."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.generation.errors import GenerationError
from hope_megatron.generation.sampling import SamplingOptions, sample

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02]).log()
NUM_DRAWS = 40_000


def _frequencies(options: SamplingOptions, seen: torch.Tensor | None = None) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    draws = sample(LOGITS.expand(NUM_DRAWS, -1), options, rng, seen)
    return torch.bincount(draws, minlength=5) / NUM_DRAWS


def _assert_distribution(frequencies: torch.Tensor, expected: torch.Tensor) -> None:
    assert (frequencies[expected == 0] == 0).all()
    torch.testing.assert_close(frequencies, expected, atol=0.012, rtol=0)  # five standard deviations of the draw


def test_plain_sampling_follows_the_softmax() -> None:
    _assert_distribution(_frequencies(SamplingOptions()), LOGITS.exp())


def test_temperature_sharpens() -> None:
    _assert_distribution(_frequencies(SamplingOptions(temperature=0.5)), (2 * LOGITS).softmax(-1))


def test_top_k_keeps_k_and_renormalises() -> None:
    _assert_distribution(_frequencies(SamplingOptions(top_k=2)), torch.tensor([2 / 3, 1 / 3, 0, 0, 0]))


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.89, 3), (0.95, 4), (1.0, 5)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: int) -> None:
    expected = torch.where(torch.arange(5) < kept, LOGITS.exp(), 0.0)
    _assert_distribution(_frequencies(SamplingOptions(top_p=top_p)), expected / expected.sum())


def test_top_p_is_independent_of_token_order() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    rng = torch.Generator().manual_seed(0)
    draws = sample(LOGITS[order].expand(2000, -1), SamplingOptions(top_p=0.6), rng)
    assert set(order[draws].tolist()) == {0, 1}


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert sample(LOGITS.expand(3, -1), SamplingOptions(temperature=0), rng).tolist() == [0, 0, 0]
    assert torch.equal(rng.get_state(), before)


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seen = torch.tensor([[True, False, True, False]])
    greedy, rng = SamplingOptions(temperature=0, repetition_penalty=1.5), torch.Generator()
    assert sample(logits, greedy, rng, seen).item() == 1
    assert sample(logits[:, 2:], greedy, rng, seen[:, 2:]).item() == 1
    assert sample(logits, greedy, rng, ~seen).item() == 0


def test_one_seed_gives_one_text() -> None:
    draws = [sample(LOGITS.expand(50, -1), SamplingOptions(), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
    ],
)
def test_impossible_options_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(GenerationError, match=next(iter(bad))):
        SamplingOptions(**bad)
