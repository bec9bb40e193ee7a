"""Decoding that goes on learning: what was read, and what was written, changes the fast CMS weights segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.generation.decoder import PREFILL_TOKENS, Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.model import ModelState
from hope_megatron.model.in_context import FastModel, fast_weights


class LearningDecoder(Decoder):
    """A Decoder whose model learns in context.

    `state` stands at the last border of a segment that has been learnt from, and `pending` holds the tokens since then: a
    segment is learnt from, in one piece, as soon as the token after it is known. Until then its tokens are read ahead at the
    weights as they stand. So the state is bounded, and learning the same as in evaluation of the same text.
    """

    _ahead: ModelState | None = None  # after the first `_num_ahead` pending tokens
    _num_ahead = 0
    _fast: FastModel | None = None

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Learn from the segments that are whole, read the rest, and return the logits [B, V] of the token that follows."""
        self.read_ahead()
        unread = self.pending[:, self._num_ahead :]
        if not unread.size(1):
            raise GenerationError("an empty prompt: give at least one token to continue from")
        if self._num_ahead == 0:
            self._ahead, self._fast = self.state, fast_weights(self.model, self.state.inner if self.state else None)
        output = self.model(unread, state=self._ahead, fast=self._fast, return_state=True)
        self._ahead, self._num_ahead = output.state, self.pending.size(1)
        return output.logits[:, -1]

    @torch.no_grad()
    def read_ahead(self) -> None:
        """Learn from every pending segment whose next token is known: a state saved now is small."""
        segment = self.model.model_config.cms.inner_segment_tokens
        most = max(1, PREFILL_TOKENS // segment) * segment
        while self.pending.size(1) > (rest := self._to_border(segment)):
            n = min(rest + (self.pending.size(1) - 1 - rest) // segment * segment, most)
            x, y = self.pending[:, :n], self.pending[:, 1 : n + 1]
            self.state = self.model(x, y, self.state, learn=True, return_state=True).state
            self.pending, self._num_ahead = self.pending[:, n:], 0

    def _to_border(self, segment: int) -> int:
        """Tokens that the segment still lacks in which `state` stands."""
        inner = self.state.inner if self.state else None
        return segment - (inner.position if inner else 0) % segment

    @torch.no_grad()
    def finish(self) -> None:
        """The stream ends here: learn from the pending tokens that fill no segment too. The last one, whose next is not known,
        stays pending; a stream that goes on all the same begins its clocks anew."""
        self.read_ahead()
        x, y = self.pending[:, :-1], self.pending[:, 1:]
        self.state = self.model(x, y, self.state, learn=True, flush=True, return_state=True).state
        self.pending, self._num_ahead = self.pending[:, -1:], 0
