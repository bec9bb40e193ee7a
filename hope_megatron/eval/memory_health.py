"""How the memories of a model fare: what its mixers did with a text, as traces or as one figure per layer and memory.

| figure | per | what |
|---|---|---|
| memory/update_norm | layer, memory | relative change of the weights by one chunk, mean over chunks |
| memory/drift | layer, memory | distance from the learned initial state at the end of the context, relative to that state |
| memory/surprise | layer, memory | mean error of the memory about its targets before it learns them |
| memory/eta | layer | mean inner learning rate |
| memory/retention | layer | mean retention alpha per token |
| cms/update_norm | level | relative size of the level's last optimizer update, over its matrices in all layers |

Means are over heads, sequences and tokens. A name ends in the layer, counted from 1, and the memory: memory/drift/layer_01/mem.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.ops.memory_trace import MemoryTrace, trace_memory

_LEVEL = re.compile(r"layers\.\d+\.mlp\.levels\.(\d+)\.(?:up|down)\.")


def memory_mixers(model: nn.Module) -> list[MemoryMixer]:
    """The layers' mixers that have memories, in order."""
    return [module for module in model.modules() if isinstance(module, MemoryMixer)]


@contextmanager
def observed_memories(model: nn.Module, keep: Callable[[int, MemoryTrace], None]) -> Iterator[None]:
    """Hand the trace of every forward pass of every memory mixer to `keep(layer_number, trace)`, layers from 1.

    Traces hold this rank's heads. The forward pass itself is not touched.
    """
    mixers = memory_mixers(model)
    try:
        for mixer in mixers:
            number = mixer.layer_number
            mixer.observer = lambda *inputs, number=number: keep(number, trace_memory(*inputs))
        yield
    finally:
        for mixer in mixers:
            mixer.observer = None


def health_figures(layer: int, trace: MemoryTrace) -> dict[str, torch.Tensor]:
    """One trace as figures: scalars by name (see the module)."""
    figures = {
        f"memory/eta/layer_{layer:02}": trace.eta.mean(),
        f"memory/retention/layer_{layer:02}": trace.alpha.mean(),
    }
    for i, name in enumerate(trace.names):
        where = f"layer_{layer:02}/{name}"
        figures[f"memory/update_norm/{where}"] = trace.update[i].mean()
        figures[f"memory/drift/{where}"] = trace.drift[i, -1].mean()
        figures[f"memory/surprise/{where}"] = trace.surprise[i].mean()
    return figures


def measure_memories(model: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Figures of one forward pass, averaged over all ranks, which call together: each has equally many heads and sequences.

    Args:
        model: the model.
        forward: runs it on this rank's sequences, without gradients.
    """
    figures: dict[str, torch.Tensor] = {}
    with observed_memories(model, lambda layer, trace: figures.update(health_figures(layer, trace))):
        forward()
    if not figures:
        return {}
    joined = torch.stack([value.double() for value in figures.values()])
    if dist.is_initialized():
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
    return dict(zip(figures, joined.tolist()))


def cms_figure(parameter: str) -> str | None:
    """The figure that a parameter's update belongs to, levels from 1; None if it is no matrix of a CMS level."""
    match = _LEVEL.search(parameter)
    return f"cms/update_norm/level_{int(match[1]) + 1}" if match else None
