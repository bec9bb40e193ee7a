"""Decoding that learns: what evaluation learns of the same text, in bounded memory, also across a state file."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli import generate
from hope_megatron.cli.learning import prepare_learning
from hope_megatron.cli.main import main
from hope_megatron.config import ConfigError, ParallelConfig
from hope_megatron.config.load import override_inner_clocks
from hope_megatron.convert.open_model import OpenModel
from hope_megatron.eval.perplexity import score_heldout
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.generation.learning import LearningDecoder
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.generation.state_file import load_state, save_state
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.model.in_context import set_inner_clocks
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model as tiny_config

CLOCKS = ["cms.levels.0.inner_chunk_tokens=4", "cms.levels.0.inner_rate=0.05", "cms.levels.0.inner_momentum=0.5"]
CLOCKS += ["cms.levels.1.inner_chunk_tokens=8", "cms.levels.1.inner_rate=0.05"]
ATOL = 5e-5  # float32: the token loop adds in another order, and learning magnifies it


def trained_model(*clocks: str, **changes) -> LanguageModel:
    """A model built and filled without clocks, which gets them afterwards."""
    init_distributed(ParallelConfig())
    model = build_model(tiny_config(**changes), seed=0).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    if clocks:
        set_inner_clocks(model, override_inner_clocks(model.model_config, clocks))
    return model


@pytest.mark.parametrize("changes", [{}, {"layer_pattern": ("attention",)}], ids=["hope", "hope_attention"])
def test_a_model_trained_without_clocks_learns_a_text_that_repeats(changes):
    """Seven tokens over and over: with clocks the loss falls, without it stays."""
    tokens = torch.arange(7).repeat(60)[:401].numpy()
    kwargs = dict(context_tokens=None, window_tokens=50, batch_size=1)
    static = score_heldout(trained_model(**changes), tokens, **kwargs)
    learning = score_heldout(trained_model(*CLOCKS, **changes), tokens, learn=True, **kwargs)
    assert abs(learning[:4] - static[:4]).max() < 1e-5
    assert learning[-50:].mean() < 0.7 * static[-50:].mean()


@pytest.mark.parametrize("prompt_tokens", [1, 4, 5, 21])
def test_stepwise_logits_are_those_of_evaluation(prompt_tokens):
    model = trained_model(*CLOCKS)
    tokens = torch.randint(61, (2, 31), generator=torch.Generator().manual_seed(1))
    losses = model(tokens[:, :-1], tokens[:, 1:].contiguous(), learn=True).losses
    decoder = LearningDecoder(model, batch_size=2)
    decoder.append(tokens[:, :prompt_tokens])
    for position in range(prompt_tokens, 31):
        logits = decoder.next_logits()
        found = torch.nn.functional.cross_entropy(logits, tokens[:, position], reduction="none")
        torch.testing.assert_close(found, losses[:, position - 1], atol=ATOL, rtol=0)
        decoder.append(tokens[:, position : position + 1])
    assert decoder.pending.size(1) <= 4 + 1


@pytest.mark.parametrize("lengths", [[2, 2, 2, 2, 3], [3] * 7, [5, 1, 5], [1] * 9])
def test_calls_of_any_length_learn_the_same(lengths: list[int]):
    """Tokens given two by two, with a clock of four; also from a state that stands inside a segment."""
    model, total = trained_model(*CLOCKS), sum(lengths)
    tokens = torch.randint(61, (2, total), generator=torch.Generator().manual_seed(4))
    whole = LearningDecoder(model, batch_size=2)
    whole.append(tokens)
    expected = whole.next_logits()
    decoder = LearningDecoder(model, batch_size=2)
    for piece in tokens.split(lengths, 1):
        decoder.append(piece)
        found = decoder.next_logits()
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    first = lengths[0]
    state = model(tokens[:, :first], tokens[:, 1 : first + 1], learn=True, return_state=True).state
    decoder = LearningDecoder(model, 2, state=state, pending=tokens[:, first:])
    torch.testing.assert_close(decoder.next_logits(), expected, atol=ATOL, rtol=0)


def test_a_stream_that_ends_is_learnt_to_its_end(tmp_path: Path):
    model = trained_model(*CLOCKS)
    tokens = torch.randint(61, (1, 11), generator=torch.Generator().manual_seed(5))
    decoder = LearningDecoder(model, 1)
    decoder.append(tokens)
    decoder.finish()
    expected = model(tokens[:, :10], tokens[:, 1:], learn=True, flush=True, return_state=True).state
    found = decoder.state.tensors()
    assert decoder.pending.tolist() == [[int(tokens[0, 10])]] and decoder.state.inner.position == 0
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found[name], tensor, atol=ATOL, rtol=0)
    save_state(tmp_path / "s", decoder)
    again = load_state(str(tmp_path / "s"), model, LearningDecoder)
    torch.testing.assert_close(again.next_logits(), decoder.next_logits(), atol=ATOL, rtol=0)


def test_a_state_inside_a_segment_is_saved(tmp_path: Path):
    model = trained_model(*CLOCKS)
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(6))
    state = model(tokens[:, :6], tokens[:, 1:7], learn=True, return_state=True).state
    decoder = LearningDecoder(model, 1, state=state, pending=tokens[:, 6:7])
    save_state(tmp_path / "s", decoder)
    again = load_state(tmp_path / "s", model, LearningDecoder)
    for d in (decoder, again):
        d.append(tokens[:, 7:])
    torch.testing.assert_close(again.next_logits(), decoder.next_logits(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("read", [1, 6, 16, 17])
def test_a_state_file_goes_on_as_if_nothing_had_happened(tmp_path: Path, read: int):
    model, options = trained_model(*CLOCKS), SamplingOptions(temperature=0)
    tokens = torch.randint(61, (1, read), generator=torch.Generator().manual_seed(2))

    def generate(decoder: Decoder) -> list[int]:
        return [int(t) for t in decoder.generate(20, options, torch.Generator())]

    decoder = LearningDecoder(model, 1)
    decoder.append(tokens)
    decoder.read_ahead()
    save_state(tmp_path / "s", decoder)
    expected = generate(decoder)
    assert generate(load_state(tmp_path / "s", model, LearningDecoder)) == expected
    frozen = load_state(tmp_path / "s", model)  # uses what was learnt, and learns no more
    generate(frozen)
    assert (frozen.state.inner is None) == (read <= 4)
    if frozen.state.inner is not None:
        assert frozen.state.inner.position == (read - 1) // 4 * 4


def test_a_state_that_other_clocks_learnt_is_refused(tmp_path: Path):
    decoder = LearningDecoder(trained_model(*CLOCKS), 1)
    decoder.append(torch.zeros(1, 9, dtype=torch.int64))
    decoder.read_ahead()
    save_state(tmp_path / "s", decoder)
    with pytest.raises(GenerationError, match="give the model its clocks with --learn"):
        load_state(tmp_path / "s", trained_model())
    with pytest.raises(GenerationError, match="by other clocks"):
        load_state(tmp_path / "s", trained_model(*CLOCKS[:2]), LearningDecoder)


def test_state_is_bounded():
    model = trained_model(*CLOCKS)
    sizes = set()
    decoder = LearningDecoder(model, 1)
    for _ in range(6):
        decoder.append(torch.randint(61, (1, 16)))
        decoder.read_ahead()
        sizes.add((decoder.state.num_bytes(), decoder.pending.size(1)))
    assert len({size for size, _ in sizes}) == 1 and max(n for _, n in sizes) <= 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cms.levels.0.hidden_size=8", "inner clocks only"),
        ("cms.levels.0.inner_rate_kind=learned", "inner clocks only"),
        ("cms.connection=independent", "inner clocks only"),
        ("memory.eta_max=0", "inner clocks only"),
        ("cms.levels.7.inner_rate=1", "a list of 2"),
        ("cms.levels.0.inner_rate=-1", "at least 0"),
        ("cms.levels.0.inner_rate=0.1", "no inner_chunk_tokens"),
    ],
)
def test_only_clocks_can_be_given_to_a_trained_model(override, message):
    with pytest.raises(ConfigError, match=message):
        override_inner_clocks(tiny_config(), [override])


def test_the_command_learns_when_the_model_has_clocks_or_is_given_them():
    ask = lambda model, learn=None, no_learn=False: prepare_learning(  # noqa: E731
        argparse.Namespace(learn=learn, no_learn=no_learn), model
    )
    assert not ask(trained_model())
    assert ask(trained_model(*CLOCKS)) and not ask(trained_model(*CLOCKS), no_learn=True)
    with pytest.raises(ModelReferenceError, match="no CMS level of this model has a clock"):
        ask(trained_model(), learn=[])
    model = trained_model()
    assert ask(model, learn=CLOCKS) and model.model_config.cms.levels[0].inner_chunk_tokens == 4


def test_the_command_learns_the_rest_before_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [f"def function_{i}(argument, value={i}):\n" for i in range(300)]
    tokenizer = train_tokenizer(lines, tmp_path / "tokenizer.model", 300)
    model = trained_model(vocab_size=300)
    monkeypatch.setattr(generate, "open_model", lambda *_: OpenModel("tiny", model, tokenizer, 32, None))
    positions = []
    for options in ([], ["--learn-rest"]):
        state = tmp_path / f"state{len(options)}"
        command = ["generate", "tiny", "--prompt", "def function_1(", "--max-new-tokens", "3", "--state", str(state)]
        assert main([*command, *options, "--learn", *CLOCKS]) == 0
        positions.append(load_state(state, model, LearningDecoder).state.inner.position)
    assert positions[0] >= 8 and positions[1] == 0
    model = trained_model(vocab_size=300)  # without clocks
    assert main([*command, "--learn-rest"]) == 2
