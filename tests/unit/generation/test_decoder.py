"""Decoding token by token equals reading the whole text at once, also across a state file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hope_megatron.generation import decoder as decoder_module
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.generation.state_file import load_state, save_state
from hope_megatron.model import LanguageModel

GREEDY = SamplingOptions(temperature=0)
ATOL = 2e-5  # float32: chunk form and token loop add in another order


def _generate(decoder: Decoder, count: int, options: SamplingOptions = GREEDY, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.stack(list(decoder.generate(count, options, rng)), dim=1)


@pytest.mark.parametrize("prompt_tokens", [1, 7, 8, 21])
def test_stepwise_logits_equal_those_of_one_pass(tiny_model: LanguageModel, prompt_tokens: int) -> None:
    tokens = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = tiny_model(tokens).logits
    decoder = Decoder(tiny_model, batch_size=2)
    decoder.append(tokens[:, :prompt_tokens])
    for position in range(prompt_tokens, 30):
        torch.testing.assert_close(decoder.next_logits(), whole[:, position - 1], atol=ATOL, rtol=0)
        decoder.append(tokens[:, position : position + 1])


def test_a_long_prompt_is_read_in_pieces(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(61, (1, 45), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 10)
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(tokens)
    torch.testing.assert_close(decoder.next_logits(), tiny_model(tokens).logits[:, -1], atol=ATOL, rtol=0)


def test_reading_ahead_leaves_one_token_and_changes_nothing(tiny_model: LanguageModel) -> None:
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(3))
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(tokens)
    decoder.read_ahead()
    assert decoder.pending.tolist() == [[int(tokens[0, -1])]]
    decoder.read_ahead()
    torch.testing.assert_close(decoder.next_logits(), tiny_model(tokens).logits[:, -1], atol=ATOL, rtol=0)


def test_greedy_decoding_takes_the_argmax_of_the_whole_text(tiny_model: LanguageModel) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(prompt)
    text = prompt
    for token in _generate(decoder, 12)[0]:
        assert token == tiny_model(text).logits[0, -1].argmax()
        text = torch.cat((text, token.view(1, 1)), dim=1)


def test_rows_of_a_batch_do_not_mix(tiny_model: LanguageModel) -> None:
    prompts = torch.tensor([[3, 1, 4], [2, 7, 1]])
    together = Decoder(tiny_model, batch_size=2)
    together.append(prompts)
    found = _generate(together, 10)
    for row in range(2):
        alone = Decoder(tiny_model, batch_size=1)
        alone.append(prompts[row : row + 1])
        assert torch.equal(_generate(alone, 10)[0], found[row])


def test_state_has_constant_size(tiny_model: LanguageModel) -> None:
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(torch.tensor([[1]]))
    sizes = set()
    for _ in decoder.generate(40, GREEDY, torch.Generator()):
        sizes.add(decoder.state.num_bytes())
    assert (
        len(sizes) == 2
    )  # inside a chunk its first weights are kept beside those of now; at a border they are the same


@pytest.mark.parametrize("read_tokens", [0, 1, 13])
def test_a_saved_stream_continues_as_if_never_interrupted(
    tiny_model: LanguageModel, tmp_path: Path, read_tokens: int
) -> None:
    options = SamplingOptions(temperature=0.9, repetition_penalty=1.3)
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(torch.tensor([[9, 8, 7]]))
    if read_tokens:
        _generate(decoder, read_tokens, options)
    save_state(tmp_path / "state.safetensors", decoder)
    resumed = load_state(tmp_path / "state.safetensors", tiny_model)
    more = torch.tensor([[5, 6]])
    decoder.append(more)
    resumed.append(more)
    assert torch.equal(_generate(resumed, 15, options, seed=1), _generate(decoder, 15, options, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_of_other_weights_is_refused(tiny_model: LanguageModel, tmp_path: Path) -> None:
    decoder = Decoder(tiny_model, batch_size=1)
    decoder.append(torch.tensor([[9]]))
    path = tmp_path / "state.safetensors"
    save_state(path, decoder)
    tiny_model.norm.weight.data[0] += 1e-3
    try:
        with pytest.raises(GenerationError, match="another model"):
            load_state(path, tiny_model)
    finally:
        tiny_model.norm.weight.data[0] -= 1e-3
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(GenerationError, match="not a whole state file"):
        load_state(path, tiny_model)
    with pytest.raises(GenerationError, match="does not exist"):
        load_state(tmp_path / "none", tiny_model)


def test_bad_prompts_are_refused(tiny_model: LanguageModel) -> None:
    decoder = Decoder(tiny_model, batch_size=1)
    with pytest.raises(GenerationError, match="empty prompt"):
        decoder.next_logits()
    with pytest.raises(GenerationError, match="outside the vocabulary of 61"):
        decoder.append(torch.tensor([[61]]))
