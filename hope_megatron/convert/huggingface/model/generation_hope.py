"""generate() with a recurrent state: prompts of any length in a batch, beams, and texts that go on from an earlier state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .cache_hope import HopeCache

_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"
"""What this version of transformers calls the cache in its loops."""

_NOT_FORWARDED = ("position_ids", "cache_position", "token_type_ids", "labels", "shift_labels")
"""What `generate` may hand on and a step does not need: the state knows its position, and nothing is scored."""


def given_cache(*names: Any) -> HopeCache | None:
    """The one of cache, past_key_values and state that is given.

    Raises:
        ValueError: two of them, or another kind of cache.
    """
    given = [value for value in names if value is not None]
    if len(given) > 1:
        raise ValueError("cache, past_key_values and state are names of one thing; give one of them")
    if given and not isinstance(given[0], HopeCache):
        raise ValueError(
            f"a HOPE model goes on from the `state` of an earlier output of its own, not from a {type(given[0]).__name__}; "
            "leave it out to begin a text"
        )
    return given[0] if given else None


def _padding_in_front(ids: Tensor | None, given: dict[str, Any]) -> Tensor | None:
    """`ids`, and `attention_mask` and `inputs_embeds` in `given`, so that what comes next follows the last token of each row."""
    mask, embeds = torch.as_tensor(given["attention_mask"]), given.get("inputs_embeds")
    if mask.dim() != 2 or bool(mask[:, -1:].all()):
        return ids
    behind = mask.flip(1).long().argmax(1)
    columns = (torch.arange(mask.size(1), device=mask.device) - behind[:, None]) % mask.size(1)
    given["attention_mask"] = mask.gather(1, columns)
    if embeds is not None:
        given["inputs_embeds"] = embeds.gather(1, columns[..., None].expand_as(embeds))
    return ids.gather(1, columns) if ids is not None and ids.shape == mask.shape else ids


class HopeGeneration(GenerationMixin):
    """The parts of GenerationMixin that know what a state is."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and further:

        Args:
            inputs, input_ids: prompts [B, T]. Padding, which attention_mask must mark, may stand on either side. A prompt
                without a token begins after an end mark, as documents do in training.
            state: where the streams stand; `input_ids` then hold only what comes next, at least one token. So for `inputs_embeds`.
            cache, past_key_values: the same state by transformers' names. If attention_mask is longer than input_ids, these
                hold only what comes next; otherwise they hold the whole text, of which the state has read the beginning.
        """
        state = kwargs.pop("state", None)
        cache = given_cache(state, kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        embeds = kwargs.get("inputs_embeds")
        if inputs is None and embeds is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is not None:
            inputs, kwargs["attention_mask"] = self._begun(torch.as_tensor(inputs), kwargs.get("attention_mask"), cache)
        given, mask = inputs if embeds is None else embeds, kwargs.get("attention_mask")
        if cache is not None and given is not None:
            length = given.size(1)
            if state is not None or (mask is not None and mask.size(1) > length):  # only what comes next
                cache = cache.begun()
                kwargs["attention_mask"] = None if mask is None else mask[:, mask.size(1) - length :]
        if cache is not None:
            kwargs[CACHE] = cache
        elif kwargs.get("attention_mask") is not None:
            inputs = _padding_in_front(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _begun(self, ids: Tensor, mask: Tensor | None, cache: HopeCache | None) -> tuple[Tensor, Tensor]:
        """Prompts of at least one token, an end mark where there is none, and their mask."""
        if ids.size(-1) == 0:
            ids = ids.new_empty(ids.size(0) if ids.dim() == 2 else 1, 0, dtype=torch.int64)
            ids = torch.cat((ids, ids.new_full((ids.size(0), 1), self._end_mark(cache))), 1)
            return ids, torch.ones_like(ids)
        if mask is None:
            mask = self._mask_at_ends(ids) if cache is None else torch.ones_like(ids)
        if mask.dim() == 2 and not bool((rows := mask.any(1)).all()):
            ids, mask = ids.clone(), mask.clone()
            ids[~rows, -1], mask[~rows, -1] = self._end_mark(cache), 1
        return ids, mask

    def _end_mark(self, cache: HopeCache | None) -> int:
        if cache is not None:
            raise ValueError(
                "generate() from a state needs a token to go on with; give at least one new token in input_ids"
            )
        end = self.generation_config.eos_token_id
        end = self.config.eos_token_id if end is None else end
        if end is None:
            raise ValueError(
                "an empty prompt begins after the end mark, and this model's eos_token_id is not set; set it"
            )
        return int(end[0] if isinstance(end, (list, tuple)) else end)

    def _mask_at_ends(self, ids: Tensor) -> Tensor:
        """Where no mask was given: zeros at runs of the pad token at the ends of a row, as no text begins or ends with it."""
        pad, end = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        ends = end if isinstance(end, (list, tuple)) else [end]
        if pad is None or pad in ends:
            return torch.ones_like(ids)
        real = (ids != pad).long()
        return ((real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)).long()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: HopeCache | None = None,
        past_key_values: HopeCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        in_loop: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The prompt or what of it the state has not read; then the last token."""
        cache = given_cache(cache, past_key_values)
        common: dict[str, Any] = {
            **{name: value for name, value in kwargs.items() if name not in _NOT_FORWARDED},
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
            "logits_to_keep": 1,
        }
        if in_loop:
            return {"input_ids": input_ids[:, -1:], "cache": cache, **common}
        common |= {"cache": cache, "attention_mask": attention_mask}
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        text = input_ids if inputs_embeds is None else self._embedded(inputs_embeds, input_ids, attention_mask)
        if cache is not None:
            if cache.num_columns >= text.size(1):
                raise ValueError(
                    f"the state has read {cache.num_columns} tokens and {name} hold {text.size(1)}; give the whole "
                    "text with at least one new token, or state=... and the new tokens alone"
                )
            text = text[:, cache.num_columns :]
        return {name: text, **common}

    def _embedded(self, prompt: Tensor, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The prompt [B, T, D]; without a state also what was drawn since, for which the mask has grown."""
        drawn = 0 if mask is None else mask.size(1) - prompt.size(1)
        return torch.cat((prompt, self.get_input_embeddings()(input_ids[:, -drawn:])), 1) if drawn > 0 else prompt

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """From the second step on there is a state, which has read all but the last token; without one the mask grows."""
        if outputs.cache is not None:
            return {**model_kwargs, CACHE: outputs.cache, "in_loop": True}
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            return model_kwargs
        return {**model_kwargs, "attention_mask": torch.cat((mask, mask.new_ones(mask.size(0), 1)), 1)}

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """No key-value cache is made: the state comes out of the first call."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a HOPE model has a state of its own; "
                "leave it out"
            )

    def _get_initial_cache_position(self, *args: Any) -> dict[str, Any]:
        """Transformers 4 counts positions here; the state knows its own."""
        return args[-1]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Rows repeated for beams or several continuations, states too."""
        ids, expanded = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if expand_size > 1 and expanded.get(CACHE) is not None:
            expanded[CACHE] = expanded[CACHE].repeat(expand_size)
        return ids, expanded
