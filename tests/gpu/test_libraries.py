"""Libraries that compute parts of a step, against PyTorch, with their real kernels. Not run yet: no GPU was at hand."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.config.libraries import LibrariesConfig
from hope_megatron.ops.libraries import checks, pytorch
from hope_megatron.runtime import libraries
from hope_megatron.runtime.libraries import Where
from hope_megatron.runtime.step_parts import STEP_PARTS
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build
from hope_megatron.training.state import TrainingState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
PAIRS = [(name, candidate) for name, part in STEP_PARTS.items() for candidate in part.candidates[:-1]]
IDS = [f"{name}-{candidate.name}" for name, candidate in PAIRS]


def skip_where_it_is_not(candidate):
    reason = candidate.why_not(Where("cuda", conv_channels=192))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("name", "candidate"), [pair for pair in PAIRS if pair[1].check], ids=lambda x: getattr(x, "name", x)
)
def test_equals_pytorch(name, candidate):
    skip_where_it_is_not(candidate)
    assert libraries.load(candidate.check)("cuda") is None


def test_pytorchs_fused_adam():
    assert checks.adam(pytorch.fused_adam_update, "cuda") is None


@pytest.mark.parametrize(("name", "candidate"), PAIRS, ids=IDS)
def test_a_run_trains_as_without_it(name, candidate):
    """Losses and norms of three steps in bf16 at ZeRO-1."""
    skip_where_it_is_not(candidate)
    everywhere = {part: rows.candidates[-1].name for part, rows in STEP_PARTS.items() if part != "cross_entropy"}
    histories = []
    for settings in (everywhere, everywhere | {name: candidate.name}):
        config = tiny_run_config(precision="bf16", training={"libraries": LibrariesConfig(**settings)})
        histories.append(advance(build(config), config, TrainingState(), 3))
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=0.02, atol=0)
