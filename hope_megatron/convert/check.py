"""The proof at the end of an export: the files, read back, compute what training computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.convert.errors import ExportCheckError
from hope_megatron.convert.local_model import build_local_model
from hope_megatron.convert.source import CheckpointSource
from hope_megatron.model import LanguageModel

LOGIT_TOLERANCE = 1e-4  # float32; other tensor-parallel sizes add in another order, which costs about 1e-6


@dataclass(frozen=True)
class ExportCheck:
    """Logits of the exported model against those of a reference, on the same tokens.

    Attributes:
        reference: whose logits the export was compared with.
        num_tokens: tokens compared.
        max_difference: largest absolute difference of two logits.
        reference_loss, exported_loss: mean next-token loss of both on these tokens, nats.
    """

    reference: str
    num_tokens: int
    max_difference: float
    reference_loss: float
    exported_loss: float

    def __str__(self) -> str:
        return (
            f"logits of {self.num_tokens} tokens against {self.reference}: largest difference "
            f"{self.max_difference:.1e} (allowed {LOGIT_TOLERANCE:.0e}); "
            f"loss {self.reference_loss:.6f} and {self.exported_loss:.6f}"
        )


def check_against_training(model: LanguageModel, source: CheckpointSource) -> ExportCheck:
    """Compare a model read from exported files with its checkpoint.

    The reference is the probe: logits of a held-out sequence that the training processes themselves computed at the end
    of the run, at their parallel layout. A checkpoint from the middle of a run has none, and a bf16 run's probe is too
    coarse to judge float32 weights by; then the reference is a float32 model made from the checkpoint's pieces.

    Raises:
        ExportCheckError: the largest difference is above LOGIT_TOLERANCE, or a logit is not finite.
    """
    config = source.config
    probe = source.probe
    if probe is not None and config.training.precision == "fp32":
        tokens, expected, reference = probe.tokens, probe.logits, "the training processes"
    else:
        tokens = probe.tokens if probe is not None else _any_tokens(config.model.vocab_size, config.training.seq_length)
        original = build_local_model(config.model, source.tensors(), source=str(source.path))
        expected, reference = _logits(original, tokens), "the checkpoint's weights in float32"
    found = _logits(model, tokens)
    check = ExportCheck(
        reference, tokens.numel(), float((found - expected).abs().max()), _loss(expected, tokens), _loss(found, tokens)
    )
    if not check.max_difference <= LOGIT_TOLERANCE:  # also when it is NaN
        raise ExportCheckError(f"the export was undone, because it computes something else: {check}")
    return check


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    return model(tokens.to(next(model.parameters()).device)).logits.float().cpu()


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def _any_tokens(vocab_size: int, num_tokens: int) -> Tensor:
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
