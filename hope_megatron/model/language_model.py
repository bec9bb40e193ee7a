"""Embedding, layers, final norm, output head and loss."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.context_parallel import gather_tokens
from hope_megatron.layers.continuum_mlp import FastLevels
from hope_megatron.layers.linear import column_parallel, enter_parallel_region
from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.layers.norm import RMSNorm
from hope_megatron.layers.parameters import declare, normal
from hope_megatron.layers.specs import layer_spec
from hope_megatron.model.in_context import FastModel, fast_weights, read_and_learn
from hope_megatron.model.loss import vocab_parallel_losses
from hope_megatron.model.offload import kept_on_host
from hope_megatron.model.sharded_state import sharded_parameters
from hope_megatron.model.state import ModelState
from hope_megatron.ops.precision import wide


class ModelOutput(NamedTuple):
    """Losses where targets were given, logits where not; the state only when asked for."""

    losses: Tensor | None  # [B, T] float32, nats, of the tokens that were given; 0 where the target is IGNORE
    logits: Tensor | None  # [B, T cp, vocab_size] float32, whole on every tensor- and context-parallel rank
    state: ModelState | None


class LanguageModel(MegatronModule):
    """A decoder over a stream of tokens, sharded by Megatron-Core."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, *, recompute: str = "none", offload: bool = False
    ):
        super().__init__(config)
        self.model_config, self.recompute, self.offload = model, recompute, offload
        self.embedding = VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=None,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        declare(self.embedding.weight, normal(model.init_std), shard_dim=0, weight_decay=True)
        self.memory_tokens = None
        if model.attention.segment_tokens:  # of ARMT
            shape = (model.attention.memory_tokens, model.hidden_size)
            tokens = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            self.memory_tokens = declare(tokens, normal(model.init_std))
        self.layers = nn.ModuleList(
            build_module(layer_spec(mixer, model), config=config, model=model, layer_number=i + 1)
            for i, mixer in enumerate(model.mixers)
        )
        for layer in self.layers:
            if isinstance(layer.mixer, MemoryMixer):
                layer.mixer.recompute_memory = recompute != "none"
        self.norm = RMSNorm(
            model.hidden_size,
            model.norm_epsilon,
            sum_over_tp=config.sequence_parallel,
            dtype=config.params_dtype,
            initial=1
            / model.width_multiplier,  # muP's division of the logits, in a place that every reader of the weights has
            width_fan_in=True,
        )
        self.head = column_parallel(
            model.hidden_size,
            model.padded_vocab_size,
            config,
            normal(model.init_std),
            role="vector",
            allocate=not model.tie_embeddings,
            width_fan_in=False,
        )

    def init_state(self, batch_size: int) -> ModelState:
        """The state of `batch_size` streams of which nothing has been read."""
        return ModelState(tuple(layer.init_state(batch_size) for layer in self.layers))

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For Megatron-Core's distributed checkpointing: where this rank's shards lie in the whole parameters."""
        return sharded_parameters(self, prefix)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        state: ModelState | None = None,
        *,
        documents: Tensor | None = None,
        return_state: bool = False,
        learn: bool = False,
        flush: bool = False,
        fast: FastModel | None = None,
    ) -> ModelOutput:
        """Read a piece of each stream.

        Args:
            tokens: [B, T] int64, the same on every tensor-parallel rank. Under context parallelism this rank's slice of the
                piece: T is 1 / cp of its tokens; with `learn` its slice of each segment (`own_spans`).
            targets: [B, T] int64, the next tokens, or IGNORE. With targets the result holds losses, without them logits.
            state: where the streams stand; None begins new ones.
            documents: number of the document that each token of the whole piece belongs to, [B, T cp] integers. Each document is
                then read as if it stood alone. Neither with `state` nor with `return_state` nor with `learn`.
            return_state: also return where they stand now.
            learn: let the inner clocks tick on the way; see `read_and_learn`. Otherwise what the state has learnt is used,
                and stays as it is.
            flush: with `learn`: the streams end here, so the rest that fills no chunk is learnt from too.
            fast: what `fast_weights` made of the state, for callers that read many pieces at the same weights.

        Under sequence parallelism T must be divisible by the tensor-parallel size.
        """
        if documents is not None and (state is not None or return_state or learn):
            raise ValueError(
                "documents that are read apart take and return no state, and are not learnt from in context"
            )
        if learn:
            assert targets is not None, "learning in context needs targets"
            losses, state = read_and_learn(self, tokens, targets, state, return_state=return_state, flush=flush)
            return ModelOutput(losses, None, state)
        inner = state.inner.without_rest() if state and state.inner else None
        fast = fast_weights(self, inner) if fast is None else fast
        layers = state.layers if state else None
        logits, states = self.read(tokens, layers, fast, documents, keep_states=return_state)
        end = ModelState(states, inner) if return_state else None
        if targets is None:
            logits = gather_tokens(gather_from_tensor_model_parallel_region(wide(logits)))
            return ModelOutput(None, logits[..., : self.model_config.vocab_size].transpose(0, 1), end)
        return ModelOutput(self.losses(logits, targets), None, end)

    def read(
        self,
        tokens: Tensor,
        states: tuple[Any, ...] | None,
        fast: FastModel | None,
        documents: Tensor | None = None,
        *,
        keep_states: bool = True,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """This rank's logits [T, B, padded_vocab / tp] of tokens [B, T], and the mixers' states after them.

        Args:
            tokens: those of this rank's slice.
            states: those of the mixers, by layer.
            fast: weights in the place of the CMS levels' own, by layer and level.
            documents: as for `forward`.
            keep_states: False drops the states at once, which else live as long as the pass; none are returned.
        """
        x = self._embed(tokens)
        num_text = x.size(0)
        if self.memory_tokens is not None:
            x = torch.cat([x, self._memory_tokens(tokens, states)])
        ends = []
        nothing: tuple[FastLevels | None, ...] = (None,) * len(self.layers)
        for layer, layer_state, weights in zip(self.layers, states or nothing, fast or nothing, strict=True):
            if self.recompute == "layer" and torch.is_grad_enabled():
                with kept_on_host() if self.offload else contextlib.nullcontext():
                    x, layer_state = checkpoint(
                        layer, x, layer_state, documents, weights, use_reentrant=False, preserve_rng_state=False
                    )
            else:
                x, layer_state = layer(x, layer_state, documents, weights)
            if keep_states:
                ends.append(layer_state)
            del layer_state  # else the last layer's lives on beside the logits
        return self._head(self.norm(x[:num_text])), tuple(ends)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses [B, T] float32 of `read`'s logits, which backward overwrites."""
        first = logits.size(-1) * parallel_state.get_tensor_model_parallel_rank()
        return vocab_parallel_losses(
            logits,
            targets.t(),
            first=first,
            num_valid=min(logits.size(-1), max(0, self.model_config.vocab_size - first)),
            group=parallel_state.get_tensor_model_parallel_group(),
        ).t()

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [T, B, D], or [T/tp, B, D] under sequence parallelism."""
        x = self.embedding(tokens)
        return x if self.config.sequence_parallel else x.transpose(0, 1).contiguous()

    def _memory_tokens(self, tokens: Tensor, states: tuple[Any, ...] | None) -> Tensor:
        """Memory tokens [n M, B, D] of the n segments that tokens [B, T] fill up (ARMT)."""
        assert self.memory_tokens is not None and self.model_config.attention.segment_tokens
        B, T = tokens.shape
        num_full = ((states[0].attention.position if states else 0) + T) // self.model_config.attention.segment_tokens
        return self.memory_tokens.repeat(num_full, 1).unsqueeze(1).expand(-1, B, -1)

    def _head(self, x: Tensor) -> Tensor:
        """[T, B, D] -> this rank's logits [T, B, padded_vocab / tp]; the columns that pad the vocabulary are no tokens."""
        weight = self.embedding.weight if self.model_config.tie_embeddings else None
        return self.head(enter_parallel_region(x, self.config), weight=weight)[0]
