"""Autoregressive decoding with an explicit recurrent state: constant memory and constant time per token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hope_megatron.generation.errors import GenerationError
from hope_megatron.generation.sampling import SamplingOptions, sample
from hope_megatron.model import LanguageModel, ModelState

PREFILL_TOKENS = 1024  # prompt tokens per forward pass: bounds the logits in memory, [B, 1024, V] fp32


class Decoder:
    """B streams of equal length over one model.

    A prompt is read in chunk form; then one token at a time. All streams have the same number of tokens, because the
    memories' chunk borders depend on the position: decode prompts of different lengths one after the other.

    Attributes:
        model: in eval mode.
        state: recurrent state after every token but those in `pending`; None before the first token.
        pending: [B, n] int64, tokens that belong to the stream and that the model has not read yet.
        seen: [B, V] bool, tokens of the stream so far, for the repetition penalty.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        *,
        state: ModelState | None = None,
        pending: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model.eval()
        self._vocab_size = model.model_config.vocab_size
        self.state = state
        self.pending = torch.empty(batch_size, 0, dtype=torch.int64, device=device) if pending is None else pending
        self.seen = torch.zeros(batch_size, self._vocab_size, dtype=torch.bool, device=device) if seen is None else seen

    def append(self, tokens: Tensor) -> None:
        """Add tokens [B, n] int64 to the streams; the model reads them when its next logits are wanted."""
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < self._vocab_size):
            raise GenerationError(
                f"prompt token ids span {int(tokens.min())}..{int(tokens.max())}, outside the vocabulary of "
                f"{self._vocab_size}; use the tokenizer that the model was trained with"
            )
        tokens = tokens.to(self.pending.device)
        self.pending = torch.cat((self.pending, tokens), dim=1)
        self.seen.scatter_(1, tokens, True)

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Read what is pending and return the logits [B, V] fp32 of the token that follows."""
        if not self.pending.size(1):
            raise GenerationError("an empty prompt: give at least one token to continue from")
        self.read_ahead()
        return self._read(1)[:, -1]

    @torch.no_grad()
    def read_ahead(self) -> None:
        """Read what is pending but for the last token, whose logits are what comes next: a state saved now is small."""
        while (waiting := self.pending.size(1) - 1) > 0:
            self._read(min(waiting, PREFILL_TOKENS))

    def _read(self, num_tokens: int) -> Tensor:
        """Logits [B, num_tokens, V] of the first pending tokens, which are pending no more."""
        output = self.model(self.pending[:, :num_tokens], state=self.state, return_state=True)
        self.state, self.pending = output.state, self.pending[:, num_tokens:]
        return output.logits

    def generate(self, max_new_tokens: int, options: SamplingOptions, rng: torch.Generator) -> Iterator[Tensor]:
        """Draw tokens [B] int64 one after the other, each appended to its stream before it is yielded."""
        for _ in range(max_new_tokens):
            token = sample(self.next_logits(), options, rng, self.seen)
            self.append(token.unsqueeze(1))
            yield token
