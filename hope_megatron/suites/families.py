"""Suites that train every family on synthetic tasks: formal languages, recall, MAD, needles."""

from __future__ import annotations

from collections.abc import Mapping

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.fit import TEST_SEQUENCES, fit_options, fit_task, score
from hope_megatron.suites.languages import LANGUAGES, language_tasks
from hope_megatron.suites.mad import mad_tasks
from hope_megatron.suites.models import DEFAULT_FAMILIES, check_families, small_hope, suite_model
from hope_megatron.suites.needles import KINDS, needle_tasks
from hope_megatron.suites.recall import recall_tasks
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Task

# Counting modulo a number: a write must be able to turn what its key holds round, hence rates up to 2; retention takes what tokens
# did to features and keys back to the learned initial state within some tens of them. Counting without bound: writes so small
# that they nearly add up, and hardly any forgetting. Three counts at once: writes that do add up, neither erased by DGD nor made
# under features that move (docs/suites.md).
_PERIODIC_HOPE = ("memory.eta_max=2", "memory.eta_init=0.5", "memory.alpha_init=0.9")
_COUNTING_HOPE = ("memory.eta_max=0.01", "memory.eta_init=0.5", "memory.alpha_init=0.9999")
_ADDING_HOPE = (*_COUNTING_HOPE, "memory.dgd_layers=none", "memory.written_layers=output")
_LANGUAGES_HOPE = {
    name: _PERIODIC_HOPE if language.periodic else _COUNTING_HOPE for name, language in LANGUAGES.items()
} | {"a^n b^n c^n": _ADDING_HOPE}
# What filler writes fades a needle. Hence features near SiLU's linear range, where those of orthogonal keys hardly overlap, and
# hardly any forgetting.
_NEEDLES_HOPE = ("memory.input_scale=0.3", "memory.alpha_init=0.99999")


def languages(options: SuiteOptions) -> Suite:
    """Formal languages, at chunks of one token."""
    longest = max(options.lengths or (12 if options.quick else 40,))
    return _family_suite(
        "languages",
        "Formal languages",
        language_tasks(longest),
        options,
        width=16 if options.quick else 32,
        chunk_tokens=1,
        steps=150 if options.quick else 1000,
        optimizer="m3",
        hope=_LANGUAGES_HOPE,
        quantity="share of strings without a mistake",
        paper="HOPE solves all six at 100 % in the training length and in the longer bin.",
        notes="Memories are written and read token by token (chunk_tokens 1), as what a write depends on must be there before "
        "the next token; matrix memories compute the same in longer chunks. HOPE has one setting for parity, (aa)* and (abab)*, "
        "and one for the languages whose counts grow, a^n b^n c^n without DGD and with W1 alone written; the other families have "
        "theirs throughout.",
    )


def recall(options: SuiteOptions) -> Suite:
    """Copying and associative recall, in and beyond the trained size."""
    return _family_suite(
        "recall",
        "Copying and associative recall",
        recall_tasks(longest=max(options.lengths or (8 if options.quick else 16,)), pairs=4 if options.quick else 8),
        options,
        width=32 if options.quick else 64,
        chunk_tokens=8,
        steps=150 if options.quick else 1500,
    )


def mad(options: SuiteOptions) -> Suite:
    """The five tasks of the MAD suite."""
    return _family_suite(
        "mad",
        "MAD",
        mad_tasks(max(options.lengths or (32 if options.quick else 64,))),
        options,
        width=32 if options.quick else 64,
        chunk_tokens=16,
        steps=150 if options.quick else 1500,
        optimizer="m3",
        paper="HOPE leads the attention-free families on compression, in-context recall, fuzzy recall, selective copying "
        "and memorization.",
        notes="Sequences are shorter and vocabularies smaller than in MAD itself; compression is asked by position.",
    )


def needles(options: SuiteOptions) -> Suite:
    """Needles among filler tokens, asked at and beyond the trained length."""
    lengths = options.lengths or ((64, 128) if options.quick else (128, 512, 2048, 8192))
    return _family_suite(
        "needles",
        "Needles in a haystack, models trained from scratch",
        needle_tasks(lengths),
        options,
        width=32 if options.quick else 64,
        chunk_tokens=16,
        steps=150 if options.quick else 500,
        optimizer="m3",
        hope=dict.fromkeys(KINDS, _NEEDLES_HOPE),
        quantity="share of questions answered without a mistake, by length",
        paper="HOPE leads the attention-free families on RULER's needles.",
        notes=f"Trained at {lengths[0]} tokens; longer ones are streamed with the state carried on. HOPE begins with a smaller W2 "
        "and less forgetting than its defaults; the other families have theirs.",
        test_tokens=1 << 18,
    )


def _family_suite(
    name: str,
    title: str,
    tasks: list[Task],
    options: SuiteOptions,
    *,
    width: int,
    chunk_tokens: int,
    steps: int,
    optimizer: str = "adamw",
    hope: Mapping[str, tuple[str, ...]] | None = None,
    quantity: str = "share of answers that are right",
    paper: str = "",
    notes: str = "",
    test_tokens: int | None = None,
) -> Suite:
    by_name = {task.name: task for task in tasks}
    families = check_families(options.families or DEFAULT_FAMILIES)
    hope_settings = {task.name: (*(hope or {}).get(task.name, ()), *options.hope) for task in tasks}
    chunk, width = options.chunk_tokens or chunk_tokens, options.width or width
    layers, heads = options.layers or 2, options.heads or 2
    fitting = fit_options(options, steps, optimizer=optimizer)

    def config(task: Task, family: str) -> ModelConfig:
        base = small_hope(task.vocab_size, width=width, layers=layers, heads=heads, chunk_tokens=chunk)
        return suite_model(family, base, hope_settings[task.name])

    def _test_sequences(bin_name: str) -> int:
        """As many as `test_tokens` allow at the bin's length; at least 16."""
        if test_tokens is None:
            return TEST_SEQUENCES
        return max(16, min(TEST_SEQUENCES, test_tokens // int(bin_name.split()[0].replace(",", ""))))

    def run(cell: Cell) -> Scores:
        task = by_name[cell.task]
        model, _ = fit_task(config(task, cell.subject), task, fitting, cell.seed)
        return {name: score(model, task, name, _test_sequences(name)) for name in task.bins}

    return Suite(
        name=name,
        title=title,
        tasks=chosen("task", options.tasks, tuple(by_name)),
        subjects=families,
        seeds=options.seeds,
        settings={
            "quick": options.quick,
            "width": width,
            "layers": layers,
            "heads": heads,
            "chunk_tokens": chunk,
            "steps": fitting.steps,
            "batch_size": fitting.batch_size,
            "lr": fitting.lr,
            "optimizer": fitting.optimizer,
            "hope": hope_settings,
            "bins": {task.name: list(task.bins) for task in tasks},
            "lessons": {task.name: list(task.lessons) for task in tasks},
        },
        run=run,
        quantity=quantity,
        guessing=lambda task, column: by_name[task].guessing(column) if column in by_name[task].bins else None,
        paper=paper,
        notes=notes,
        parameters={family: num_parameters(config(tasks[0], family)) for family in families},
    )
