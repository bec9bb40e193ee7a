"""The proof at the end of an export: the files, read back, compute what training computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.checkpoint.errors import ExportCheckError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.local_model import build_local_model
from hope_megatron.model import LanguageModel

LOGIT_TOLERANCE = 1e-4  # float32; other tensor-parallel sizes add in another order, which costs about 1e-6
PERPLEXITY_TOLERANCE = 1e-4  # relative


@dataclass(frozen=True)
class ExportCheck:
    """Logits of the exported model against those of a reference, on the same tokens.

    Attributes:
        reference: whose logits the export was compared with.
        num_tokens: tokens compared.
        kind_of_tokens: `held-out`, or `random` where no held-out data are at hand.
        max_difference: largest absolute difference of two logits.
        reference_loss, exported_loss: mean next-token loss of both on these tokens, nats.
    """

    reference: str
    num_tokens: int
    kind_of_tokens: str
    max_difference: float
    reference_loss: float
    exported_loss: float

    @property
    def passed(self) -> bool:
        """Whether logits and perplexity are the same; false also where one is NaN."""
        same_perplexity = math.isclose(
            _perplexity(self.exported_loss), _perplexity(self.reference_loss), rel_tol=PERPLEXITY_TOLERANCE
        )
        return self.max_difference <= LOGIT_TOLERANCE and same_perplexity

    def __str__(self) -> str:
        return (
            f"logits of {self.num_tokens} {self.kind_of_tokens} tokens against {self.reference}: largest difference "
            f"{self.max_difference:.1e} (allowed {LOGIT_TOLERANCE:.0e}); "
            f"perplexity {_perplexity(self.reference_loss):.4f} and {_perplexity(self.exported_loss):.4f}"
        )


def check_against_training(
    model: LanguageModel, source: CheckpointSource, heldout: Tensor | None = None
) -> ExportCheck:
    """Compare a model read from exported files with its checkpoint.

    The reference is the probe: logits of a held-out sequence that the training processes themselves computed at the end
    of the run, at their parallel layout. A checkpoint from the middle of a run has none, and a bf16 run's probe is too
    coarse to judge float32 weights by; then the reference is a float32 model made from the checkpoint's pieces.

    Args:
        heldout: [1, T] int64 held-out tokens for a checkpoint without a probe.

    Raises:
        ExportCheckError: logits or perplexity differ by more than the tolerances, or a logit is not finite.
    """
    config = source.config
    probe = source.probe
    if probe is not None and config.training.precision == "fp32":
        tokens, kind, expected, reference = probe.tokens, "held-out", probe.logits, "the training processes"
    else:
        tokens, kind = (heldout if probe is None else probe.tokens), "held-out"
        if tokens is None:
            tokens, kind = _random_tokens(config.model.vocab_size, config.training.seq_length), "random"
        original = build_local_model(config.model, source.tensors(), source=str(source.path))
        expected, reference = _logits(original, tokens), "the checkpoint's weights in float32"
    found = _logits(model, tokens)
    difference = float((found - expected).abs().max())
    check = ExportCheck(reference, tokens.numel(), kind, difference, _loss(expected, tokens), _loss(found, tokens))
    if not check.passed:
        raise ExportCheckError(f"the export was undone, because it computes something else: {check}")
    return check


def _perplexity(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())  # infinite where math.exp raises


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    return model(tokens.to(next(model.parameters()).device)).logits.float().cpu()


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def _random_tokens(vocab_size: int, num_tokens: int) -> Tensor:
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
