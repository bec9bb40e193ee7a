"""From fitted laws to a run: which size, how many tokens, what learning rate, and the loss to expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hope_megatron.config.accounting import num_non_embedding, num_parameters
from hope_megatron.config.load import resolve_run_config
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.run import RunConfig
from hope_megatron.sweep.analysis import FamilyAnalysis
from hope_megatron.sweep.bootstrap import Estimate
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.sizes import scale_to_width, train_flops_per_token

DEFAULT_TARGET = 10.0
"""Without a target, recommend for this many times the compute of the largest cell."""


@dataclass(frozen=True)
class Recommendation:
    """The run that the laws advise for a compute budget."""

    family: str
    flops: float
    """Compute of the recommended run; the target, up to the steps of width and batch."""
    parameters: Estimate
    """Optimal N at the target, with its interval."""
    tokens: Estimate
    """Optimal D at the target."""
    loss: Estimate
    """Loss to expect of the recommended run, scatter between runs included."""
    config: RunConfig
    lr_reason: str
    epochs: float
    """Passes over the sweep's training data that its tokens take; NaN when the amount of data is not known."""
    extrapolation: float
    """Target over the compute of the largest run that was fitted."""


def target_flops(families: Sequence[FamilyAnalysis], wanted: float | None) -> float:
    """The compute that is asked about."""
    return wanted or DEFAULT_TARGET * max(run.flops for family in families for run in family.runs)


def recommend(plan: Plan, families: Sequence[FamilyAnalysis], flops: float) -> list[Recommendation]:
    """A run of each family that has a loss law with an optimum, the lowest expected loss first.

    Args:
        plan: the sweep, whose cells give the proportions and the other settings.
        families: its analysis.
        flops: training FLOPs to spend.
    """
    found = [_recommend(plan, family, flops) for family in families]
    return sorted((one for one in found if one is not None), key=lambda one: one.loss.value)


def _recommend(plan: Plan, family: FamilyAnalysis, flops: float) -> Recommendation | None:
    optimum = family.optimum(flops)
    if optimum is None:
        return None
    reference = max(
        (cell for cell in plan.cells if cell.family == family.family),
        key=lambda cell: (cell.num_parameters, cell.flops),
    )
    training = reference.config.training
    model = _nearest_model(plan, reference, optimum["parameters"].value)
    steps = max(1, round(flops / train_flops_per_token(model, training.seq_length) / training.tokens_per_step))
    tokens = float(steps * training.tokens_per_step)
    parameters = float(_count(plan, model))
    lr, reason = _learning_rate(plan, family, model, parameters, tokens, flops)
    config = _run_config(plan, reference, family.family, model, steps, lr)
    return Recommendation(
        family=family.family,
        flops=tokens * train_flops_per_token(model, training.seq_length),
        parameters=optimum["parameters"],
        tokens=optimum["tokens"],
        loss=family.predict(parameters, tokens),
        config=config,
        lr_reason=reason,
        epochs=tokens / max(run.unique_tokens for run in family.runs),
        extrapolation=flops / max(run.flops for run in family.runs),
    )


def _count(plan: Plan, model: ModelConfig) -> int:
    return num_parameters(model) if plan.sweep.fit.parameters == "total" else num_non_embedding(model)


def _nearest_model(plan: Plan, reference: Cell, parameters: float) -> ModelConfig:
    """The reference's model at the width whose N comes nearest."""
    model, tp = reference.config.model, reference.config.parallel.tensor_parallel
    step = model.head_dim * tp
    best, distance = model, math.inf
    for width in range(step, 1 << 17, step):
        scaled = scale_to_width(model, width, tensor_parallel=tp)
        off = abs(math.log(_count(plan, scaled) / parameters))
        if off > distance:
            break
        best, distance = scaled, off
    return best


def _learning_rate(
    plan: Plan, family: FamilyAnalysis, model: ModelConfig, parameters: float, tokens: float, flops: float
) -> tuple[float, str]:
    """(base learning rate, where it comes from)."""
    if family.lr_law is not None:
        return family.lr_law.point(parameters, tokens, flops), "from the fitted learning-rate law"
    best = max(family.runs, key=lambda run: run.flops)
    tried = {observation.base_lr for observation in family.runs}
    source = "the best rate of the largest budget" if len(tried) > 1 else "the only rate that the sweep tried"
    return best.base_lr, source


def _run_config(plan: Plan, reference: Cell, family: str, model: ModelConfig, steps: int, lr: float) -> RunConfig:
    data = reference.config.model_dump(mode="json")
    data["model"] = model.model_copy(update={"name": f"{plan.sweep.name}_{family}"}).model_dump(mode="json")
    data["name"] = f"{plan.sweep.name}-{family}-recommended"
    data["output_dir"] = str(plan.sweep.directory.parent)
    before = reference.config.training.steps
    data["training"]["steps"] = steps
    for key in ("warmup_steps", "decay_steps"):  # the same shares of the run as in the sweep
        data["optim"][key] = round(data["optim"][key] / before * steps)
    data["optim"]["lr"] = lr
    return resolve_run_config(data, source="the recommended run")
