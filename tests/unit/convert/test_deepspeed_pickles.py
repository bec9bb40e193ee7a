"""What may come out of the files that DeepSpeed itself saved, whichever Python wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.convert.deepspeed.pickles import load_tensors
from hope_megatron.convert.deepspeed.zero import _STAND_INS


class Reduced:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    "written",
    [Reduced(getattr, ZeroStageEnum, "gradients"), Reduced(ZeroStageEnum, 2)],
    ids=["before Python 3.11.4", "since"],
)
def test_a_stage_is_read_from_any_python(tmp_path: Path, written: Reduced) -> None:
    torch.save({"zero_stage": written, "vector": torch.arange(3.0)}, tmp_path / "states.pt")
    content = load_tensors(tmp_path / "states.pt", _STAND_INS)
    assert content["zero_stage"] == 2 and content["vector"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("taken", [(ZeroStageEnum, "from_bytes"), (torch.FloatStorage, "__init__")])
def test_getattr_takes_nothing_else(tmp_path: Path, taken: tuple[Any, str]) -> None:
    torch.save(Reduced(getattr, *taken), tmp_path / "states.pt")
    with pytest.raises(ConversionError, match=r"is refused, nothing was executed: .*: it takes "):
        load_tensors(tmp_path / "states.pt", _STAND_INS)
