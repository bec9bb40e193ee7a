"""Classes that arrive in groups: who still knows the first ones at the end?

A model is first trained to learn classes in context: episodes of sentences of some base classes, each followed by a label
that means another class in every episode; the same sentence again and again first. Then new classes arrive, a group at a time,
with labels that stay:

- "in context": the weights stand still; the examples of each group are read once, and the state is all that is kept;
- "fine-tuned": the weights are trained on each group's examples;
- "EWC": the same, held where earlier groups need them by their Fisher information (arXiv 1612.00796).

After each group every class so far is tested, the label chosen among those seen so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.model import LanguageModel, ModelState
from hope_megatron.suites.episodes import (
    CLASSES_PER_GROUP,
    LABEL,
    Groups,
    episode_task,
    question,
    split_classes,
    told,
)
from hope_megatron.suites.fit import FitOptions, batch_loss, fit, fit_options, fit_task, on_device, small_model
from hope_megatron.suites.labelled import Labelled, load_labelled, synthetic_labelled
from hope_megatron.suites.models import check_families, small_hope, suite_model
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import IGNORE, Batch, pad_batch

METHODS = ("in context", "fine-tuned", "EWC")
EWC_STRENGTH = 1e8  # of mean squared gradients, which are tiny once a group is learnt: 1e3 held nothing
_PIECE_TOKENS = 256


def build(options: SuiteOptions) -> Suite:
    """Every data set named, else the synthetic one; every family by every method."""
    data = {d.name: d for d in map(load_labelled, options.data)} or {
        "synthetic": synthetic_labelled(24 if options.quick else 230)
    }
    num_groups, shots = (3, 4) if options.quick else (5, 8)
    fitting = fit_options(options, 100 if options.quick else 1500, batch_size=8, optimizer="m3")
    # EWC holds weights by its gradient's size, which Muon's updates do not have; fine-tuned by the same for a fair comparison
    tuning = FitOptions(max(1, fitting.steps // 10), fitting.batch_size)
    chunk, width = options.chunk_tokens or 16, options.width or (32 if options.quick else 64)
    layers, heads = options.layers or 2, options.heads or 2
    families = check_families(options.families or ("hope", "transformer_pp"))

    def config(labelled: Labelled, family: str) -> ModelConfig:
        vocab = LABEL + sum(map(len, split_classes(labelled, num_groups)[1]))
        hope = small_hope(vocab, width=width, layers=layers, heads=heads, chunk_tokens=chunk)
        return suite_model(family, hope, options.hope)

    @cache
    def base_weights(name: str, family: str, seed: int) -> list[Tensor]:
        """After learning to learn: the same for every method."""
        labelled = data[name]
        model, _ = fit_task(config(labelled, family), episode_task(labelled, num_groups, shots), fitting, seed)
        return [p.detach().clone() for p in model.parameters()]

    def run(cell: Cell) -> Scores:
        family, method = cell.subject.split(": ")
        labelled = data[cell.task]
        model, base = small_model(config(labelled, family), cell.seed), base_weights(cell.task, family, cell.seed)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), base):
                parameter.copy_(value)
        _, groups = split_classes(labelled, num_groups)
        if method == "in context":
            return _scores(learn_in_context(model, labelled, groups, shots, cell.seed))
        strength = EWC_STRENGTH if method == "EWC" else 0.0
        return _scores(learn_in_weights(model, labelled, groups, shots, tuning, strength, cell.seed))

    first = next(iter(data.values()))
    return Suite(
        name="classes",
        title="Class-incremental learning",
        tasks=chosen("data set", options.tasks, tuple(data)),
        subjects=tuple(f"{family}: {method}" for family in families for method in METHODS),
        seeds=options.seeds,
        settings={
            "quick": options.quick,
            "groups": num_groups,
            "shots": shots,
            "steps": fitting.steps,
            "steps_per_group": tuning.steps,
            "lr_per_group": tuning.lr,
            "optimizer_per_group": tuning.optimizer,
            "ewc_strength": EWC_STRENGTH,
            "width": width,
            "layers": layers,
            "heads": heads,
            "chunk_tokens": chunk,
            "lr": fitting.lr,
            "optimizer": fitting.optimizer,
            "classes": {name: len(labelled.classes) for name, labelled in data.items()},
            "hope": options.hope,
        },
        run=run,
        quantity="accuracy over all classes seen so far, after each group; forgetting: accuracy that earlier groups lost",
        less_is_better=("forgetting",),
        paper="HOPE is compared on CLINC, Banking77 and DBpedia with in-context learning, EWC and other baselines.",
        notes=f"At most half of the classes, {CLASSES_PER_GROUP} a group, arrive in groups; the rest are for learning to learn.",
        parameters={family: num_parameters(config(first, family)) for family in families},
    )


def learn_in_context(
    model: LanguageModel, labelled: Labelled, groups: Groups, shots: int, seed: int
) -> list[list[float]]:
    """Accuracy of each group so far, after each group; the state goes on from group to group."""
    model.eval()
    labels, state, accuracies = _fixed_labels(groups), None, []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, 10**6 + number))
        tokens, _ = told(_shown(labelled, group, shots), {name: labels[name] for name in group}, shots, rng)
        state = _read(model, tokens, state)
        accuracies.append(_accuracies(model, labelled, labels, groups[: number + 1], state))
    return accuracies


def learn_in_weights(
    model: LanguageModel,
    labelled: Labelled,
    groups: Groups,
    shots: int,
    options: FitOptions,
    strength: float,
    seed: int,
) -> list[list[float]]:
    """The same by training on single sentences of each group; strength 0 is plain fine-tuning."""
    labels, accuracies = _fixed_labels(groups), []
    anchors: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, 10**6 + number))
        draw = partial(_single_sentences, labelled, labels, group, shots)
        penalty = partial(_ewc_penalty, anchors, strength) if anchors and strength else None
        fit(model, lambda step: draw(options.batch_size, rng), options, penalty=penalty)  # noqa: B023 (used at once)
        if strength:
            anchors += _fisher(model, lambda: draw(1, rng))  # noqa: B023
        accuracies.append(_accuracies(model, labelled, labels, groups[: number + 1], None))
    return accuracies


def forgetting(accuracies: list[list[float]]) -> float:
    """Mean over all groups but the last: best accuracy ever minus accuracy at the end."""
    last = len(accuracies) - 1
    return float(np.mean([max(row[g] for row in accuracies[g:]) - accuracies[last][g] for g in range(last)]))


def _scores(accuracies: list[list[float]]) -> Scores:
    after = {f"after {i}": float(np.mean(row)) for i, row in enumerate(accuracies, 1)}
    return {**after, "forgetting": forgetting(accuracies)}


def _shown(labelled: Labelled, group: list[str], shots: int) -> dict[str, list[np.ndarray]]:
    """The sentences of a group that are told: the first ones of every class."""
    return {name: labelled.train[name][:shots] for name in group}


def _fixed_labels(groups: Groups) -> dict[str, int]:
    return {name: i for i, name in enumerate(name for group in groups for name in group)}


def _single_sentences(
    labelled: Labelled, labels: dict[str, int], group: list[str], shots: int, size: int, rng: np.random.Generator
) -> Batch:
    """Sentences of a group, each alone, of those that in-context learning gets to read."""
    rows, shown = [], _shown(labelled, group, shots)
    for name in rng.choice(group, size):
        sentences = shown[name]
        rows.append(question(sentences[int(rng.integers(len(sentences)))], labels[name]))
    return pad_batch(rows)


def _accuracies(
    model: LanguageModel, labelled: Labelled, labels: dict[str, int], seen: Groups, state: ModelState | None
) -> list[float]:
    """Of each group seen."""
    return [_accuracy(model, labelled, labels, seen, tested, state) for tested in seen]


@torch.no_grad()
def _accuracy(
    model: LanguageModel,
    labelled: Labelled,
    labels: dict[str, int],
    seen: Groups,
    tested: list[str],
    state: ModelState | None,
) -> float:
    """Share of a group's test sentences whose label is the likeliest among those seen."""
    model.eval()
    batch = pad_batch([question(words, labels[name]) for name in tested for words in labelled.test[name][:8]])
    tokens, targets = on_device(model, batch)
    start = repeat_state(model, state, len(tokens)) if state is not None else None
    logits = model(tokens, state=start).logits
    asked = targets != IGNORE
    known = LABEL + torch.tensor([labels[name] for group in seen for name in group], device=tokens.device)
    answers = known[logits[asked][:, known].argmax(1)]
    return (answers == targets[asked]).float().mean().item()


@torch.no_grad()
def _read(model: LanguageModel, tokens: list[int], state: ModelState | None) -> ModelState:
    """The state of one stream after some more tokens."""
    stream = torch.tensor([tokens], device=next(model.parameters()).device)
    for piece in stream.split(_PIECE_TOKENS, 1):
        state = model(piece, state=state, return_state=True).state
    assert state is not None
    return state


def repeat_state(model: LanguageModel, state: ModelState, times: int) -> ModelState:
    """The state of one stream as that of `times` equal ones; which axis counts streams, two new states tell."""
    one, two = model.init_state(1).tensors(), model.init_state(2).tensors()
    repeated = {}
    for name, tensor in state.tensors().items():
        axes = [i for i, (a, b) in enumerate(zip(one[name].shape, two[name].shape)) if a != b]
        repeated[name] = tensor.repeat_interleave(times, axes[0]) if axes else tensor
    return ModelState.from_tensors(repeated, like=state)


def _fisher(model: LanguageModel, draw: Callable[[], Batch], samples: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, where it is, mean squared gradient of single sentences), for every parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = [torch.zeros_like(p) for p in parameters]
    for _ in range(samples):
        gradients = torch.autograd.grad(batch_loss(model, draw()), parameters, allow_unused=True)
        for square, gradient in zip(squares, gradients):
            if gradient is not None:
                square += gradient.detach() ** 2 / samples
    return [(p, p.detach().clone(), square) for p, square in zip(parameters, squares)]


def _ewc_penalty(anchors: list[tuple[Tensor, Tensor, Tensor]], strength: float) -> Tensor:
    """strength / 2 times the sum over groups of F (theta - theta*)^2."""
    return 0.5 * strength * torch.stack([(fisher * (p - at) ** 2).sum() for p, at, fisher in anchors]).sum()
