"""Which parameters a run changes (`optim.trainable`).

The others stay in the optimizer, so that checkpoints, ZeRO and every layout are as always: their gradients are zeros, and they do
not decay. An update of zeros is none, whatever the optimizer, but for DMGD's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from hope_megatron.config.base import ConfigError


def hold_still(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Keep parameters as they are whose names match no pattern; no patterns hold nothing.

    Raises:
        ConfigError: a pattern that no parameter matches.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"optim.trainable: no parameter matches {pattern!r}; a name is for example {names[-1]}")
    for name, parameter in model.named_parameters():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
            parameter.register_hook(torch.zeros_like)
