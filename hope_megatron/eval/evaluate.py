"""A model's held-out scores, beside the baselines counted on its training shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hope_megatron.eval.baselines import BigramModel, UnigramModel
from hope_megatron.eval.heldout import manifest_counts
from hope_megatron.eval.perplexity import heldout_score, loss_by_position, row_tokens, score_heldout, text_size
from hope_megatron.eval.token_kinds import loss_by_kind

if TYPE_CHECKING:
    from hope_megatron.convert.open_model import OpenModel


def evaluate(
    opened: OpenModel,
    tokens: np.ndarray,
    context_tokens: int | None,
    *,
    batch_size: int = 8,
    baseline_manifest: Path | str | None = None,
    stride_tokens: int | None = None,
    learn: bool = False,
) -> dict[str, Any]:
    """Score a model, and baselines if asked for, on the same targets tokens[1:].

    Args:
        context_tokens, stride_tokens: see `score_heldout`.
        baseline_manifest: training shards to count the baselines on.
        learn: the model learns in context.

    Returns:
        `scores` by model name (see `HeldoutScore.as_dict`), baselines first, how they came about, and, unless rows overlap,
        `loss_by_position` of the model and `loss_by_kind` of all (see the functions of these names).
    """
    losses = {}
    if baseline_manifest is not None:
        counts = manifest_counts(baseline_manifest, opened.tokenizer)
        for name, baseline in (("unigram", UnigramModel(counts)), ("bigram", BigramModel(counts))):
            losses[name] = -baseline.log_probs(tokens[:-1], tokens[1:])
    started = time.monotonic()
    losses["model"] = score_heldout(
        opened.model,
        tokens,
        context_tokens=context_tokens,
        window_tokens=opened.window_tokens,
        batch_size=batch_size,
        stride_tokens=stride_tokens,
        learn=learn,
    )
    seconds = time.monotonic() - started
    num_targets = len(tokens) - 1
    row_length = row_tokens(num_targets, context_tokens, batch_size)
    decode = opened.tokenizer.decode
    size = text_size(tokens[1:], decode, opened.tokenizer.eos_id)
    return {
        "model": opened.name,
        "tokens": num_targets,
        "context_tokens": context_tokens,
        "stride_tokens": stride_tokens,
        "batch_size": batch_size,
        "inner_clocks": opened.model.model_config.cms.model_dump(mode="json") if learn else None,
        "tokens_per_second": num_targets / seconds,
        "scores": {name: heldout_score(nats, size).as_dict() for name, nats in losses.items()},
        "loss_by_position": []
        if stride_tokens
        else loss_by_position(losses["model"], row_length, opened.window_tokens),
        "loss_by_kind": [] if stride_tokens else loss_by_kind(losses, tokens, row_length, decode),
    }
