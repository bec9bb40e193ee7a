"""Classes that arrive in groups: who still knows the first ones at the end?

A model is first trained to learn classes in context: episodes of sentences of some base classes, each followed by a label
that means another class in every episode. Then new classes arrive, a group at a time, with labels that stay:

- "in context": the weights stand still; the examples of each group are read once, and the state is all that is kept;
- "fine-tuned": the weights are trained on each group's examples;
- "EWC": the same, held where earlier groups need them by their Fisher information (arXiv 1612.00796).

After each group every class so far is tested, the label chosen among those seen so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.model import LanguageModel, ModelState
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, batch_loss, fit, fit_options, on_device, small_model
from hope_megatron.suites.labelled import NUM_WORDS, Labelled, load_labelled, synthetic_labelled
from hope_megatron.suites.models import check_families, family_model, small_hope
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import IGNORE, Batch, pad_batch

ASK = 1
WORD = 2  # first word id
LABEL = WORD + NUM_WORDS  # first label id
METHODS = ("in context", "fine-tuned", "EWC")
EWC_STRENGTH = 1000.0
_PIECE_TOKENS = 256
Groups = list[list[str]]


def build(options: SuiteOptions) -> Suite:
    """Every data set named, else the synthetic one; every family by every method."""
    data = {d.name: d for d in map(load_labelled, options.data)} or {
        "synthetic": synthetic_labelled(24 if options.quick else 60)
    }
    num_groups, shots = (3, 4) if options.quick else (5, 8)
    fitting = fit_options(options, 100 if options.quick else 1500, batch_size=16)
    group_steps = max(1, fitting.steps // 10)
    chunk, width = options.chunk_tokens or 16, options.width or (32 if options.quick else 64)
    layers, heads = options.layers or 2, options.heads or 2
    families = check_families(options.families or ("hope", "transformer_pp"))

    def config(labelled: Labelled, family: str) -> ModelConfig:
        vocab = LABEL + len(labelled.classes)
        return family_model(family, small_hope(vocab, width=width, layers=layers, heads=heads, chunk_tokens=chunk))

    @cache
    def base_weights(name: str, family: str, seed: int) -> list[Tensor]:
        """After learning to learn: the same for every method."""
        labelled = data[name]
        model = small_model(config(labelled, family), seed)
        base, groups = split_classes(labelled, num_groups)
        in_group = max(len(group) for group in groups)
        draw = partial(episodes, labelled, base, in_group, shots)
        fit(model, lambda step: draw(fitting.batch_size, np.random.default_rng((seed, step))), fitting)
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
        tuning = replace(fitting, steps=group_steps)
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
            "steps_per_group": group_steps,
            "ewc_strength": EWC_STRENGTH,
            "width": width,
            "layers": layers,
            "heads": heads,
            "chunk_tokens": chunk,
            "lr": fitting.lr,
            "optimizer": fitting.optimizer,
            "classes": {name: len(labelled.classes) for name, labelled in data.items()},
        },
        run=run,
        quantity="accuracy over all classes seen so far, after each group; forgetting: accuracy that earlier groups lost",
        paper="HOPE is compared on CLINC, Banking77 and DBpedia with in-context learning, EWC and other baselines.",
        notes="Half of the classes are for learning to learn; the other half arrives in groups.",
        parameters={family: num_parameters(config(first, family)) for family in families},
    )


def split_classes(labelled: Labelled, num_groups: int) -> tuple[list[str], Groups]:
    """The classes to learn to learn from, and groups of the others.

    Raises:
        SuiteError: if there are too few.
    """
    names = labelled.classes
    base, rest = names[: len(names) // 2], names[len(names) // 2 :]
    if len(rest) < num_groups:
        raise SuiteError(
            f"{labelled.name}: {len(names)} classes are too few for {num_groups} groups; at least {2 * num_groups}"
        )
    bounds = np.linspace(0, len(rest), num_groups + 1).astype(int)
    return base, [rest[a:b] for a, b in pairwise(bounds)]


def episodes(
    labelled: Labelled, base: list[str], num_classes: int, shots: int, size: int, rng: np.random.Generator
) -> Batch:
    """Sequences in which `num_classes` classes have random labels: sentence, mark, label; every label is asked."""
    rows = []
    for _ in range(size):
        picked = rng.choice(base, min(num_classes, len(base)), replace=False)
        labels = rng.choice(len(labelled.classes), len(picked), replace=False)
        rows.append(_told(labelled, dict(zip(picked, labels)), shots, rng))
    return pad_batch(rows)


def _told(
    labelled: Labelled, labels: dict[str, int], shots: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """`shots` sentences of each class in random order, each with its mark and label."""
    order = rng.permutation(np.repeat(np.arange(len(labels)), shots))
    names, tokens, targets = list(labels), [], []
    for i in order:
        sentences = labelled.train[names[i]]
        words = (WORD + sentences[int(rng.integers(len(sentences)))]).tolist()
        tokens += [*words, ASK, LABEL + labels[names[i]]]
        targets += [IGNORE] * len(words) + [LABEL + labels[names[i]], IGNORE]
    return tokens, targets


def learn_in_context(
    model: LanguageModel, labelled: Labelled, groups: Groups, shots: int, seed: int
) -> list[list[float]]:
    """Accuracy of each group so far, after each group; the state goes on from group to group."""
    model.eval()
    labels, state, accuracies = _fixed_labels(groups), None, []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, 10**6 + number))
        tokens, _ = _told(labelled, {name: labels[name] for name in group}, shots, rng)
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


def _fixed_labels(groups: Groups) -> dict[str, int]:
    return {name: i for i, name in enumerate(name for group in groups for name in group)}


def _single_sentences(
    labelled: Labelled, labels: dict[str, int], group: list[str], shots: int, size: int, rng: np.random.Generator
) -> Batch:
    """Sentences of a group, each alone, from the first `shots` of each class: what in-context learning gets to read."""
    rows = []
    for name in rng.choice(group, size):
        sentences = labelled.train[name][:shots]
        rows.append(_asked(sentences[int(rng.integers(len(sentences)))], labels[name]))
    return pad_batch(rows)


def _asked(words: np.ndarray, label: int) -> tuple[list[int], list[int]]:
    return [*(WORD + words).tolist(), ASK], [IGNORE] * len(words) + [LABEL + label]


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
    batch = pad_batch([_asked(words, labels[name]) for name in tested for words in labelled.test[name][:8]])
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
