"""Self-generated replay: text that the adapted model makes up itself, with what it would have answered at every token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hope_megatron.consolidation.replay import Experience
from hope_megatron.consolidation.waking import Teacher


@torch.no_grad()
def dream(teacher: Teacher, count: int, length: int, begin: int) -> Iterator[Experience]:
    """Rows of `length` tokens, each begun with the token `begin` from the state that the day has left.

    The state is read, never changed: all dreams begin where the day ended.
    """
    model = teacher.model
    model.eval()
    for _ in range(count):
        state, token = teacher.state, begin
        inputs, answers = np.zeros(length, np.int64), []
        for place in range(length):
            inputs[place] = token
            x = torch.tensor([[token]], device=next(model.parameters()).device)
            output = model(x, state=state, return_state=True)
            state = output.state
            drawn = teacher.draw(output.logits[0].log_softmax(-1), np.zeros(1, np.int64))
            answers.append(drawn)
            token = int(drawn[0, 0])
        draws = np.concatenate(answers)
        yield Experience(inputs, draws[:, 0].astype(np.int64), draws)
