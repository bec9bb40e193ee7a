"""Sizes of a run that its counts are linear in: the closed forms of kernels and bytes are coefficients of these (step_counts.json).

Of one rank and one micro-batch. n: tokens of its slice. D: model width. W: local heads x head width, before context parallelism
divides them: inside a mixer a rank has cp times the tokens of its slice and 1 / cp of the heads, so n W is the same there.
F: local hidden widths of all levels. S: tokens that norms and residuals see, n / tp under sequence parallelism.
"""

from __future__ import annotations

from hope_megatron.config.run import RunConfig


def layer_features(config: RunConfig, kind: str) -> dict[str, float]:
    """Of a layer of a kind, "memory" or "attention"."""
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_parallel
    n = slice_tokens(config)
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
            "B heads state": training.micro_batch_size * heads / parallel.context_parallel * state,
            "heads state": heads * state,
            "n heads": n * heads,
        }
    return found


def frame_features(config: RunConfig) -> dict[str, float]:
    """Of embedding, final norm, head and loss."""
    model, parallel = config.model, config.parallel
    n = slice_tokens(config)
    S = n / (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    V = model.padded_vocab_size / parallel.tensor_parallel
    D = model.hidden_size
    return {"one": 1.0, "n": n, "S D": S * D, "n V": n * V, "V D": V * D}


def slice_tokens(config: RunConfig) -> float:
    """Tokens that a rank reads at once: its slice of a micro-batch's sequences, or of their windows."""
    training = config.training
    return (
        training.micro_batch_size * (training.truncate_tokens or training.seq_length) / config.parallel.context_parallel
    )


def variant(config: RunConfig) -> str:
    """Which coefficients hold: a micro-batch of one sequence needs fewer copies, context parallelism more."""
    single = "/single" if config.training.micro_batch_size == 1 else ""
    return single + ("/context" if config.parallel.context_parallel > 1 else "")
