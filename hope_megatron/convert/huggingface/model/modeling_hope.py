"""A HOPE model for transformers: pure PyTorch, one device, the recurrent state as the cache.

`generate()` needs constant memory at any length where all mixers are memories; attention mixers keep their keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from hope_megatron.nn.layers import HopeLayer as PlainLayer
from hope_megatron.nn.layers import MemoryMixer, RMSNorm, architecture, linear, wide
from hope_megatron.ops.memory.operator import memory_chunked

from .cache_hope import HopeCache
from .configuration_hope import HopeConfig
from .generation_hope import HopeGeneration, given_cache
from .padding_hope import read_aligned, read_rows, spans_of


class CacheByOtherNames:
    """Of an output with a cache."""

    cache: HopeCache | None

    @property
    def state(self) -> HopeCache | None:
        """The cache, by the name that hope_megatron has for it."""
        return self.cache

    @property
    def past_key_values(self) -> HopeCache | None:
        """The cache, by the name that transformers 4 has for it."""
        return self.cache


@dataclass
class HopeModelOutput(CacheByOtherNames, ModelOutput):
    """last_hidden_state [B, T, D]; the state of the streams after the last token; hidden_states as for HopeOutput."""

    last_hidden_state: Tensor | None = None
    cache: HopeCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class HopeOutput(CacheByOtherNames, ModelOutput):
    """loss (with labels), logits [B, T, vocab_size], the state of the streams after the last token, and hidden_states: the
    embeddings, then the output of each layer, [B, T, D], the last one normed."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HopeCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@torch.compiler.disable
def memory_apart(*args: Any, **kwargs: Any) -> Any:
    """The memory operator, which torch.compile leaves as it is: traced, every chunk of a text would become a part of the graph, and
    no compiler would see the end of it."""
    return memory_chunked(*args, **kwargs)


class HopeLayer(GradientCheckpointingLayer, PlainLayer):
    """A layer that transformers' gradient checkpointing knows."""

    def __init__(self, model: SimpleNamespace, mixer: str) -> None:
        super().__init__(model, mixer)
        if isinstance(self.mixer, MemoryMixer):
            self.mixer.operator = memory_apart


class HopePreTrainedModel(PreTrainedModel):
    """What both models share: configuration and initial weights."""

    config_class = HopeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeLayer"]  # noqa: RUF012 - as transformers has it
    _is_stateful = True  # a state cannot be rolled back, as assisted decoding would want

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initial weights that hope_megatron trains from."""
        if hasattr(module, "reset"):
            module.reset()
        elif isinstance(module, nn.Embedding) or hasattr(module, "init_std"):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", self.config.architecture["init_std"]))


class HopeModel(HopePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        model = architecture(config.resolved())
        mixers = (model.layer_pattern[i % len(model.layer_pattern)] for i in range(model.num_layers))
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(HopeLayer(model, mixer) for mixer in mixers)
        self.norm = RMSNorm(model.hidden_size, model.norm_epsilon, initial=1 / model.width_multiplier)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HopeCache | None = None,
        past_key_values: HopeCache | None = None,
        state: HopeCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HopeModelOutput | tuple[Any, ...]:
        """Read a piece of each stream.

        Args:
            input_ids: [B, T] of at least one token.
            attention_mask: [B, T], or longer with what was read before in front: zeros for padding, at the beginning or the end
                of a row. Padding is not read: every row is as if it stood alone.
            inputs_embeds: [B, T, D] in the place of input_ids.
            position_ids: [B, T]; where they do not count on, another text begins (packed batches). Otherwise not needed.
            cache, past_key_values, state: three names of one thing: where the streams stand; None begins new ones.
            use_cache: whether to return where they stand now. By default unless the model is training.
            output_hidden_states: whether to return what each layer gives.
            return_dict: False returns a tuple of what is there.
        """
        cache = given_cache(cache, past_key_values, state)
        x = self._embed(input_ids, inputs_embeds)
        if cache is not None and cache.batch_size != x.size(0):
            raise ValueError(
                f"the cache has {cache.batch_size} streams, the input {x.size(0)} rows; give as many of both"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        spans = spans_of(attention_mask, position_ids, *x.shape[:2])
        if use_cache is None:
            packed = spans is not None and not spans.one_per_row(x.size(0))
            use_cache = self.config.use_cache and not self.training and not packed
        apart = cache is not None and not isinstance(cache.position, int) and x.size(1) > 1

        def read(x: Tensor, cache: HopeCache | None) -> tuple[list[Tensor], HopeCache | None]:
            return self._read(x, cache, all_layers=bool(output_hidden_states))

        if spans is None and not apart:
            hidden, after = read(x, cache)
        elif cache is None and not use_cache:
            assert spans is not None
            hidden, after = read_aligned(read, x, spans), None
        else:
            hidden, after = read_rows(read, x, spans, cache)
        output = HopeModelOutput(
            last_hidden_state=hidden[-1],
            cache=after if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, T, D] of whichever is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if x.size(1) == 0:
            raise ValueError(
                f"the input has no token, its shape is {list(x.shape[:2])}; begin a text with the end mark, as in training: "
                f"input_ids=[[{self.config.eos_token_id}]]"
            )
        return x

    def _read(self, x: Tensor, cache: HopeCache | None, all_layers: bool) -> tuple[list[Tensor], HopeCache | None]:
        """Every token of x [B, T, D] is real. Returns the last hidden state, after all others if wanted, and the new cache."""
        num_tokens, position = x.size(1), 0 if cache is None else cache.position
        hidden, states = [x], []
        for i, layer in enumerate(self.layers):
            before = None if cache is None else cache.layers[i]
            x, after = layer(x, before, position)
            hidden.append(x)
            states.append(after)
        hidden[-1] = self.norm(x)
        columns = num_tokens + (0 if cache is None else cache.num_columns)
        return hidden if all_layers else hidden[-1:], HopeCache(tuple(states), position + num_tokens, columns)


class HopeForCausalLM(HopePreTrainedModel, HopeGeneration, GenerationMixin):
    """A HOPE language model."""

    accepts_loss_kwargs = True  # the loss is a sum over labels, divided by the number that Trainer counts
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 - as transformers has it

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        model = architecture(config.resolved())
        self.model = HopeModel(config)
        self.lm_head = linear(model.hidden_size, model.vocab_size, model.init_std)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: HopeCache | None = None,
        past_key_values: HopeCache | None = None,
        state: HopeCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> HopeOutput | tuple[Any, ...]:
        """Read a piece of each stream; see HopeModel.forward.

        Args:
            labels: [B, T], input_ids again; -100 is not counted. Position t is predicted from the tokens before it.
            logits_to_keep: compute the logits of this many last tokens only, or of these positions [n]; 0 means all.
            num_items_in_batch: what the sum over labels is divided by; None: the number of labels in this batch.
            use_cache: by default unless the model is training or there are labels.
            kwargs: `shift_labels` [B, T], labels that are the next tokens already; others are not used. (Trainer takes every
                parameter with "label" in its name for one that a batch must have.)
        """
        shift_labels = kwargs.get("shift_labels")
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if use_cache is None and shift_labels is not None:
            use_cache = False
        output = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            cache=given_cache(cache, past_key_values, state),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = output.last_hidden_state
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        logits = logits.to(wide(logits.dtype))
        loss = None if shift_labels is None else _loss(logits, shift_labels, num_items_in_batch)
        output = HopeOutput(loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


def _loss(logits: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
    """Sum of the losses in nats over the targets that count, by their number or by `num_items`; 0 where none does."""
    targets = targets.flatten().to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    if num_items is None:
        num_items = (targets != -100).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _wants_dict(config: HopeConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
