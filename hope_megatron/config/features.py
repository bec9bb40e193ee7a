"""Sizes of a run that its counts are linear in: the closed forms of kernels and bytes are coefficients of these (step_counts.json).

Of one rank and one micro-batch. n: tokens. D: model width. W: local heads x head width. F: local hidden widths of all levels.
S: tokens that norms and residuals see, n / tp under sequence parallelism.
"""

from __future__ import annotations

from hope_megatron.config.run import RunConfig


def layer_features(config: RunConfig, kind: str) -> dict[str, float]:
    """Of a layer of a kind, "memory" or "attention"."""
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_parallel
    n = training.micro_batch_size * training.seq_length
    S = n / (tp if parallel.sequence_parallel else 1)
    D, heads, F = model.hidden_size, model.num_heads / tp, sum(level.hidden_size for level in model.cms.levels) / tp
    W, levels = heads * model.head_dim, len(model.cms.levels)
    found = {
        "one": 1.0,
        "levels": levels,
        "S D": S * D,
        "S D levels": S * D * levels,
        "n W": n * W,
        "n F": n * F,
        "D W": D * W,
        "D F": D * F,
    }
    if kind == "memory":
        state = model.head_dim * model.memory_hidden
        found |= {
            "B heads state": training.micro_batch_size * heads * state,
            "heads state": heads * state,
        }
    return found


def frame_features(config: RunConfig) -> dict[str, float]:
    """Of embedding, final norm, head and loss."""
    model, parallel, training = config.model, config.parallel, config.training
    n = training.micro_batch_size * training.seq_length
    S = n / (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    V = model.padded_vocab_size / parallel.tensor_parallel
    D = model.hidden_size
    return {"one": 1.0, "n": n, "S D": S * D, "n V": n * V, "V D": V * D}
