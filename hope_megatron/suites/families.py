"""Suites that train every family on synthetic tasks: formal languages, permutations, recall, MAD, needles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.cells import train_and_test
from hope_megatron.suites.fit import FitOptions
from hope_megatron.suites.grids import BOTH, STARTS, settings_of, started
from hope_megatron.suites.guessing import guessing_of
from hope_megatron.suites.held_out import TEST_SEQUENCES
from hope_megatron.suites.languages import language_tasks
from hope_megatron.suites.mad import mad_tasks
from hope_megatron.suites.models import check_families, suite_model
from hope_megatron.suites.needles import needle_tasks
from hope_megatron.suites.permutations import permutation_tasks
from hope_megatron.suites.recall import recall_tasks
from hope_megatron.suites.selection import Setting
from hope_megatron.suites.size import ModelSize, described, training_settings
from hope_megatron.suites.suite import Cell, Outcome, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Task

FAMILIES = (
    "hope",
    "hope_w1",
    "deltanet",
    "deltanet_negative",
    "gated_deltanet",
    "samba",
    "transformer_pp",
    "ttt_mlp",
    "titans",
)
_COUNTING_STARTS = ("own", "forgetting", "adding")
_KEEPING_STARTS = ("own", "keeping")
_FOUR_RATES = (("adamw", 1e-3), ("adamw", 3e-3), ("m3", 3e-3), ("m3", 1e-2))


def languages(options: SuiteOptions) -> Suite:
    """Formal languages, at chunks of one token."""
    longest = max(options.lengths or (20 if options.quick else 24,))
    return _token_by_token("languages", "Formal languages", language_tasks(longest), options, steps=400, what="strings")


def permutations(options: SuiteOptions) -> Suite:
    """State tracking: products of permutations of three and of five things, at chunks of one token."""
    longest = max(options.lengths or (8 if options.quick else 16,))
    tasks = permutation_tasks(longest)
    return _token_by_token(
        "permutations", "State tracking on permutations", tasks, options, steps=600, what="sequences"
    )


def _token_by_token(name: str, title: str, tasks: list[Task], options: SuiteOptions, *, steps: int, what: str) -> Suite:
    return family_suite(
        name,
        title,
        tasks,
        options,
        width=16 if options.quick else 32,
        chunk_tokens=1,
        steps=150 if options.quick else steps,
        starts=_COUNTING_STARTS,
        quantity=f"share of {what} without a mistake",
        notes="Memories are written and read token by token (chunk_tokens 1), as what a write depends on must be there before the "
        "next token; matrix memories compute the same in longer chunks.",
    )


def recall(options: SuiteOptions) -> Suite:
    """Copying and associative recall, in and beyond the trained size."""
    return family_suite(
        "recall",
        "Copying and associative recall",
        recall_tasks(longest=max(options.lengths or (8 if options.quick else 16,)), pairs=4 if options.quick else 8),
        options,
        chunk_tokens=8,
        rates=_FOUR_RATES,
    )


def mad(options: SuiteOptions) -> Suite:
    """The five tasks of the MAD suite."""
    return family_suite(
        "mad",
        "MAD",
        mad_tasks(max(options.lengths or (32 if options.quick else 64,))),
        options,
        chunk_tokens=16,
        rates=_FOUR_RATES,
        notes="Sequences are shorter and vocabularies smaller than in MAD itself; compression is asked by position.",
    )


def needles(options: SuiteOptions) -> Suite:
    """Needles among filler tokens, asked at and beyond the trained length."""
    lengths = options.lengths or ((64, 128) if options.quick else (128, 512, 2048, 8192))
    return family_suite(
        "needles",
        "Needles in a haystack, models trained from scratch",
        needle_tasks(lengths),
        options,
        chunk_tokens=16,
        steps=150 if options.quick else 500,
        starts=_KEEPING_STARTS,
        quantity="share of questions answered without a mistake, by length",
        notes=f"Trained at {lengths[0]} tokens; longer ones are streamed with the state carried on.",
        test_tokens=1 << 18,
    )


def family_suite(
    name: str,
    title: str,
    tasks: list[Task],
    options: SuiteOptions,
    *,
    chunk_tokens: int,
    token_by_token: tuple[str, ...] = (),
    families: tuple[str, ...] = FAMILIES,
    width: int | None = None,
    steps: int | None = None,
    starts: tuple[str, ...] = ("own",),
    rates: tuple[tuple[str, float], ...] = BOTH,
    quantity: str = "share of answers that are right",
    losses: tuple[str, ...] = (),
    notes: str = "",
    test_tokens: int | None = None,
) -> Suite:
    """A suite of small models of every family.

    Args:
        token_by_token: tasks whose chunks have one token, whatever chunk_tokens.
        families: those that are trained where the options name none.
        width, steps: 64 and 1500 by default, with --quick 32 and 150; the options' own come first.
        starts, rates: the grid that every family tries.
        losses: tasks whose score is a loss.
        test_tokens: most tokens of a test bin, whose names then begin with a length; at least 16 sequences.
    """
    by_name = {task.name: task for task in tasks}
    families = check_families(options.families or families)
    size = ModelSize.of(options, width=width or (32 if options.quick else 64), chunk_tokens=chunk_tokens)
    steps = options.steps or steps or (150 if options.quick else 1500)

    def config(task: Task, family: str) -> ModelConfig:
        own = replace(size, chunk_tokens=1) if task.name in token_by_token else size
        return suite_model(family, own.hope(task.vocab_size), options.hope)

    grid: Mapping[str, dict[str, Setting]] = {
        family: {s.name: s for s in settings_of(config(tasks[0], family), options, starts, rates)}
        for family in families
    }

    def test_sequences(bin_name: str) -> int:
        if test_tokens is None:
            return TEST_SEQUENCES
        return max(16, min(TEST_SEQUENCES, test_tokens // int(bin_name.split()[0].replace(",", ""))))

    def run(cell: Cell) -> Outcome:
        task, setting = by_name[cell.task], grid[cell.subject][cell.setting]
        model = started(config(task, cell.subject), setting.start)
        fitting = FitOptions(steps, lr=setting.lr, optimizer=setting.optimizer)
        return train_and_test(model, task, fitting, cell, {name: test_sequences(name) for name in task.bins})

    return Suite(
        name=name,
        title=title,
        tasks=chosen("task", options.tasks, tuple(by_name)),
        subjects=families,
        seeds=options.seeds,
        settings={
            **size.settings,
            **training_settings(FitOptions(steps)),
            "starts": {start: dict(STARTS[start]) for start in starts},
            "rates": [f"{optimizer} {lr:g}" for optimizer, lr in rates],
            "hope": list(options.hope),
            "bins": {task.name: list(task.bins) for task in tasks},
            "lessons": {task.name: list(task.lessons) for task in tasks},
        },
        run=run,
        grid={family: tuple(names) for family, names in grid.items()},
        quantity=quantity,
        less_is_better=losses,
        unbounded=losses,
        notes=notes,
        **described({family: config(tasks[0], family) for family in families}),
        guessing=guessing_of(by_name),
    )
