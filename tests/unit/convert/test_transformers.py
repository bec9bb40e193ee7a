"""The exported class is a good citizen of transformers: padding, states, beams, losses, embeddings, initial weights.

`tools/transformers_contract.py` runs transformers' own model tests on it too.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hope_megatron.config import AttentionConfig, MemoryConfig, ParallelConfig
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

transformers = pytest.importorskip("transformers", reason="the exported modelling code needs transformers")

from hope_megatron.convert.huggingface.model.cache_hope import map_tensors  # noqa: E402
from hope_megatron.convert.huggingface.model.configuration_hope import HopeConfig  # noqa: E402
from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM, HopeModel  # noqa: E402
from hope_megatron.convert.huggingface.names import to_transformers  # noqa: E402

PAD, EOS, VOCAB = 3, 2, 61
LENGTHS = (20, 7, 13)
MODELS = {
    "hope": {"memory": MemoryConfig(chunk_tokens=8, self_chunk_tokens=4)},
    "momentum": {"memory": MemoryConfig(chunk_tokens=8, self_chunk_tokens=4, momentum="data")},
    "window": {"layer_pattern": ("memory", "attention"), "attention": AttentionConfig(num_kv_heads=1, window_tokens=5)},
    "attention": {"layer_pattern": ("attention",)},
}


def make_config(**changes: Any) -> HopeConfig:
    architecture = json.loads(tiny_model(**changes).model_dump_json())
    return HopeConfig(architecture=architecture, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=1)


def make_model(name: str = "hope") -> HopeForCausalLM:
    """Random weights in float64, large enough that logits differ clearly and memories write."""
    torch.manual_seed(0)
    model = HopeForCausalLM(make_config(**MODELS[name])).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return model


def texts() -> Tensor:
    return torch.randint(4, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """The first LENGTHS tokens of each row, padded; the mask; and where the tokens are."""
    x, mask, places = torch.full_like(ids, PAD), torch.zeros_like(ids), []
    for row, length in enumerate(LENGTHS):
        first = {"left": ids.size(1) - length, "right": 0, "both": (ids.size(1) - length) // 2}[side]
        places.append(slice(first, first + length))
        x[row, places[row]], mask[row, places[row]] = ids[row, :length], 1
    return x, mask, places


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_padded_batch_are_as_if_alone(name: str, side: str) -> None:
    model, ids = make_model(name), texts()
    x, mask, places = padded(ids, side)
    output = model(x, attention_mask=mask)
    without = model(x, attention_mask=mask, use_cache=False)
    assert without.state is None
    more = texts().flip(1)[:, :9]
    then = model(more, attention_mask=torch.cat((mask, torch.ones_like(more)), 1), state=output.state)
    for row, length in enumerate(LENGTHS):
        alone = model(torch.cat((ids[row, :length], more[row]))[None]).logits[0]
        for found in (output, without):
            torch.testing.assert_close(found.logits[row, places[row]], alone[:length], atol=1e-12, rtol=0)
        torch.testing.assert_close(then.logits[row], alone[length:], atol=1e-12, rtol=0)
    # one row alone, padded
    (single,) = (model(x[1:2], attention_mask=mask[1:2]).logits[0, places[1]],)
    torch.testing.assert_close(single, output.logits[1, places[1]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_unequal_prompts_are_continued_as_if_alone(name: str, side: str) -> None:
    model, ids = make_model(name), texts()
    x, mask, _ = padded(ids, side)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    for given in ({"attention_mask": mask}, {}):  # without a mask the pad token says it
        found = model.generate(x, **given, **options)[:, x.size(1) :]
        for row, length in enumerate(LENGTHS):
            assert torch.equal(found[row], model.generate(ids[row : row + 1, :length], **options)[0, length:])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_continued_as_their_tokens(side: str, use_cache: bool) -> None:
    model = make_model()
    x, mask, _ = padded(texts(), side)
    embeds = model.get_input_embeddings()(x)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, attention_mask=mask, use_cache=use_cache)
    expected = model.generate(x, **options)[:, 20:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected)
    # tokens beside embeddings only stand in front of the answer
    others = model.generate(torch.full_like(x, 5), inputs_embeds=embeds, **options)
    assert torch.equal(others[:, 20:], expected) and others[0, 0] == 5


def test_embeddings_go_on_from_a_state() -> None:
    model, ids = make_model(), texts()
    embeds, options = model.get_input_embeddings()(ids), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    state, expected = model(ids[:, :8]).state, model.generate(ids, **options)[:, 20:]
    assert torch.equal(model.generate(inputs_embeds=embeds[:, 8:], state=state, **options), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, past_key_values=state, **options), expected)


@pytest.mark.parametrize("name", ["hope", "window"])
def test_gradients_of_a_padded_batch_are_the_sum_of_its_rows(name: str) -> None:
    model, ids = make_model(name).train(), texts()
    expected = None
    for row, length in enumerate(LENGTHS):
        text = ids[row : row + 1, :length]
        gradients = torch.autograd.grad(model(text, labels=text, num_items_in_batch=37).loss, list(model.parameters()))
        expected = gradients if expected is None else [a + b for a, b in zip(expected, gradients)]
    for side in ("left", "right"):
        x, mask, _ = padded(ids, side)
        labels = x.masked_fill(mask == 0, -100)
        loss = model(x, attention_mask=mask, labels=labels, num_items_in_batch=37).loss
        for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["hope", "window"])
def test_packed_texts_do_not_see_each_other(name: str) -> None:
    """`position_ids` that begin anew, as DataCollatorWithFlattening and TRL's packing make them."""
    model, ids = make_model(name), texts()
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    packed = model(ids, position_ids=positions).logits
    expected = torch.cat([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], 1)
    torch.testing.assert_close(packed, expected, atol=1e-12, rtol=0)
    rows = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, LENGTHS)]
    flat = transformers.DataCollatorWithFlattening(return_tensors="pt")(rows)
    parts = [model(row[None, :n], labels=row[None, :n]).loss.item() * (n - 1) for row, n in zip(ids, LENGTHS)]
    assert model(**flat).loss.item() == pytest.approx(sum(parts) / (sum(LENGTHS) - 3), rel=1e-12)
    with pytest.raises(ValueError, match="row 0 of the batch holds 2 texts"):
        model(ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "zeros between the tokens of row 0"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"attention_mask has shape \[1, 1, 6, 6\], expected \[1, 6\]"),
        ({"attention_mask": torch.zeros(1, 6)}, "the batch has no token"),
        (
            {
                "input_ids": torch.ones(2, 6).long(),
                "attention_mask": torch.tensor([[1] * 6, [0] * 6]),
                "use_cache": True,
            },
            "row 1 of the batch holds 0 texts",
        ),
        ({"past_key_values": transformers.DynamicCache()}, "not from a DynamicCache"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"no token, its shape is \[1, 0\].*\[\[2\]\]"),
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**({"input_ids": torch.ones(1, 6, dtype=torch.long)} | given))


@pytest.mark.parametrize("name", ["hope", "window"])
def test_a_text_goes_on_from_a_state(name: str) -> None:
    model, ids = make_model(name), texts()
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **options)[:, 20:]
    state = model(ids[:, :5]).state
    for key in ("state", "past_key_values"):
        after = model(ids[:, 5:], **{key: state}).logits
        torch.testing.assert_close(after, model(ids).logits[:, 5:], atol=1e-12, rtol=0)
    assert torch.equal(model.generate(ids[:, 5:], state=state, **options)[:, 15:], expected)
    assert torch.equal(model.generate(ids, past_key_values=state, **options)[:, 20:], expected)  # the whole text
    only_new = model.generate(ids[:, 5:], past_key_values=state, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(only_new[:, 15:], expected)
    # what generate() returns goes on too: it has read all but the last token
    turn = model.generate(ids, return_dict_in_generate=True, **options)
    more = torch.cat((turn.sequences[:, -1:], ids[:, :3]), 1)
    whole = model.generate(torch.cat((turn.sequences, ids[:, :3]), 1), **options)[:, -8:]
    assert torch.equal(model.generate(more, state=turn.past_key_values, **options)[:, -8:], whole)
    several = model.generate(
        ids[:1, 5:], state=state.select(torch.tensor([0])), num_return_sequences=3, do_sample=True, max_new_tokens=2
    )
    assert several.shape == (3, 17)
    for given, message in (
        ({"state": state, "past_key_values": state}, "names of one thing"),
        ({"input_ids": ids[:, :5], "past_key_values": state}, "has read 5 tokens and input_ids hold 5"),
        ({"input_ids": ids[:, :0], "state": state}, "at least one new token"),
        ({"input_ids": ids[:1], "state": state}, "3 streams, the input 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**({"input_ids": ids} | given))


def test_an_empty_prompt_begins_after_the_end_mark() -> None:
    model, options = make_model(), dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = EOS
    expected = model.generate(torch.tensor([[EOS]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for empty in (torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.long)):  # a tokenizer's "" is float32
        mask = torch.ones(1, 0)
        found = model.generate(
            input_ids=empty, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(found, expected)
    row = texts()[:1, :6]
    both = torch.cat((torch.full_like(row, PAD), row))
    found = model.generate(both, attention_mask=torch.tensor([[0] * 6, [1] * 6]), **(options | {"eos_token_id": EOS}))
    alone = model.generate(row, **(options | {"eos_token_id": EOS}))
    assert torch.equal(found[1, : alone.size(1)], alone[0]) and found[0, 5] == EOS


@pytest.mark.parametrize("name", ["hope", "window"])
def test_beams_equal_those_without_a_state(name: str) -> None:
    model, ids = make_model(name), texts()
    x, mask, _ = padded(ids, "left")
    options = dict(max_new_tokens=7, num_beams=3, do_sample=False, eos_token_id=None, attention_mask=mask)
    found = model.generate(x, num_return_sequences=2, **options)
    assert torch.equal(found, model.generate(x, num_return_sequences=2, use_cache=False, **options))
    greedy = model.generate(x, **(options | {"num_beams": 1}))
    assert not torch.equal(found[::2], greedy)  # beams find something else


def test_a_state_has_one_size_at_any_length() -> None:
    model = make_model()
    sizes = set()
    for length in (9, 41, 201):
        model_state, total = model(torch.ones(1, length, dtype=torch.long)).state, []
        map_tensors(lambda x, total=total: total.append(x.nbytes), model_state.layers)
        sizes.add(sum(total))
    assert len(sizes) == 1


def test_assisted_decoding_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(texts()[:1], assistant_model=make_model(), max_new_tokens=4)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        model(texts()).state.crop(3)


def test_streams_and_stops() -> None:
    model = make_model()

    class Streamer(transformers.generation.BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None: ...

    ids = texts()[:1]
    free = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, streamer=Streamer())
    assert Streamer.tokens == free[0].tolist()
    stop = lambda ids, scores: torch.full((len(ids),), ids.size(1) >= 23)  # noqa: E731
    assert model.generate(ids, max_new_tokens=10, do_sample=False, stopping_criteria=[stop]).size(1) == 23


def test_the_loss_is_that_of_all_labels_however_they_are_divided() -> None:
    model, ids = make_model(), texts()
    labels = ids.clone()
    labels[0, 4:] = -100
    labels[2] = -100
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    picked = logits.gather(2, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted == -100, 0.0)
    count = int((wanted != -100).sum())
    expected = -picked.sum().item() / count
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected, rel=1e-12)
    shifted = torch.nn.functional.pad(wanted, (0, 1), value=-100)
    assert model(ids, shift_labels=shifted).loss.item() == pytest.approx(expected, rel=1e-12)
    for parts in ((1, 1, 1), (2, 1), (3,)):
        pieces = zip(ids.split(parts), labels.split(parts))
        total = sum(model(x, labels=y, num_items_in_batch=torch.tensor(count)).loss.item() for x, y in pieces)
        assert total == pytest.approx(expected, rel=1e-12)
    ignored = model(ids[2:], labels=labels[2:]).loss
    ignored.backward()
    assert ignored.item() == 0.0 and all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())


def test_every_usual_part_is_where_tools_look_for_it() -> None:
    model, ids = make_model(), texts()
    config = model.config
    assert (config.num_attention_heads, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        4,
        2,
        32,
        VOCAB,
    )
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (8, 2, 24)
    assert isinstance(model.base_model, HopeModel) and model.get_input_embeddings() is model.model.embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    output = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(3, 20, 32)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model.model(ids).last_hidden_state, output.hidden_states[-1])
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert len(as_tuple) == 2 and torch.equal(as_tuple[1], output.logits)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, output.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, output.logits[:, [1, 5]])
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 20:])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = make_model().train(), texts()
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_are_added(tied: bool, tmp_path) -> None:
    config = make_config(tie_embeddings=tied)
    model, ids = HopeForCausalLM(config).eval(), texts()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 4)
    after = model(ids).logits
    assert after.size(-1) == VOCAB + 4 and torch.equal(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    again = HopeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, after)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"]["vocab_size"] == VOCAB + 4


@pytest.mark.parametrize("name", ["hope", "constants", "window", "muP"])
def test_a_fresh_model_begins_as_training_does(name: str) -> None:
    from hope_megatron.config.model import MupConfig

    constants = MemoryConfig(chunk_tokens=8, decay="constant", momentum="constant", output_gate="silu")
    changes = MODELS | {
        "constants": {"memory": constants, "tie_embeddings": False},
        "muP": {"mup": MupConfig(base_width=8)},
    }
    sizes = dict(hidden_size=128, num_heads=4, vocab_size=1000, num_layers=2)
    architecture = tiny_model(**(changes[name] | sizes))
    init_distributed(ParallelConfig())
    expected = dict(to_transformers(build_model(architecture).named_parameters(), architecture))
    model = HopeForCausalLM(HopeConfig(architecture=json.loads(architecture.model_dump_json())))
    found = {key: tensor for key, tensor in model.state_dict().items() if key in expected}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        mean, std = float(expected[key].mean()), float(expected[key].std())
        assert float(tensor.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(tensor.numel()) + 1e-6), key
        assert float(tensor.std()) == pytest.approx(std, rel=0.15, abs=1e-6), key
    ids = torch.randint(1000, (4, 64), generator=torch.Generator().manual_seed(0))
    assert abs(model(ids, labels=ids).loss.item() - math.log(1000)) < 0.2


def test_compiled_graphs_do_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile leaves the memory operator as it is, so that a graph has no part for every chunk; numbers stay."""
    import torch._dynamo
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    model, largest = make_model().train(), []
    with torch._dynamo.config.patch(disable=False):
        for num_tokens in (16, 32):
            torch._dynamo.reset()
            sizes.clear()
            ids = torch.randint(4, VOCAB, (2, num_tokens), generator=torch.Generator().manual_seed(0))
            expected = model(ids, labels=ids)
            expected.loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            found = torch.compile(model, backend=backend)(ids, labels=ids)
            found.loss.backward()
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
            for parameter, gradient in zip(model.parameters(), gradients):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
            model.zero_grad()
            largest.append(max(sizes))
    assert largest[0] == largest[1]
