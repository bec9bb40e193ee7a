"""Needles in text for a trained run: the haystack is streamed, so that its length costs time but no memory.

RULER's needles hide in its filler sentences, bAbI's facts in prose, as in BABILong (arXiv 2406.10149).

An answer is right if every one of its tokens is the model's first choice, which is what greedy decoding would say. Models too
small for that still show whether they remember at all: nats by which the needle makes the answer's tokens likelier than
the same haystack without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from hope_megatron.model import LanguageModel
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.needle_questions import BABI, NEEDLES, Question
from hope_megatron.suites.streamed import streamed_answers
from hope_megatron.suites.suite import Cell, Outcome, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import IGNORE, Batch
from hope_megatron.suites.text import docstrings, read_texts

Encode = Callable[[str], np.ndarray]
DEFAULT_LENGTHS = (1024, 4096, 16384, 65536)
SAMPLES = 16  # haystacks of a length and seed
KINDS = {**NEEDLES, **BABI}
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_TOKEN_BYTES = 8  # of filler read per token of the longest haystack


def haystack(
    question: Question,
    length: int,
    filler: np.ndarray,
    encode: Encode,
    rng: np.random.Generator,
    *,
    hide: bool = True,
    depth: float | None = None,
) -> Batch:
    """One sequence of exactly `length` tokens: filler with the needles in it, the question, the answer.

    Args:
        filler: tokens, read from a random place on, and again from their start.
        hide: False leaves the needles out, filler in their place.
        depth: share of the filler that stands before the needles, 0 to 1; None draws one for each.

    Raises:
        SuiteError: if the length has no room for filler.
    """
    needles = [encode(text) for text in question.needles] if hide else []
    asked, answer = encode(question.question), encode(question.answer)
    room = length + 1 - len(asked) - len(answer) - sum(map(len, needles))
    if room < 1:
        raise SuiteError(f"needles and question need {length + 1 - room} tokens; a length of {length} is too short")
    hay = np.take(filler, rng.integers(len(filler)) + np.arange(room), mode="wrap")
    places = np.sort(rng.integers(0, room + 1, len(question.needles)))
    if depth is not None:
        places = np.full_like(places, round(depth * room))
    pieces, last = [], 0
    for place, needle in zip(places, needles):
        pieces += [hay[last:place], needle]
        last = place
    stream = np.concatenate([*pieces, hay[last:], asked, answer])
    targets = np.full(length, IGNORE)
    targets[-len(answer) :] = answer
    return Batch(stream[None, :-1].astype(np.int64), targets[None])


def build(
    model: LanguageModel, encode: Encode, name: str, title: str, trained_tokens: int, options: SuiteOptions
) -> Suite:
    """Needles of every kind and length for one model.

    Args:
        encode: text to token ids.
        name, title: where the model is, and what to call it.
        trained_tokens: sequence length in training.
        options: `tasks` chooses kinds of needles, `data` the text that all of them hide in.
    """
    lengths = options.lengths or ((256, 512) if options.quick else DEFAULT_LENGTHS)
    device = next(model.parameters()).device
    filler = cache(lambda babi: encode(filler_text(babi, options.data, _TOKEN_BYTES * max(lengths))))

    @cache
    def ask(kind: str, length: int, seed: int, hide: bool) -> tuple[float, float]:
        """Share of right answers and nats per answer token. The same questions and depths with and without needles."""
        rows = []
        for sample in range(SAMPLES):
            rng = np.random.default_rng((seed, sample, length))
            rows.append(haystack(KINDS[kind](rng), length, filler(kind in BABI), encode, rng, hide=hide))
        tokens, targets = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*rows))
        answers = streamed_answers(model, tokens, targets)
        return (answers.right == answers.asked).float().mean().item(), (answers.nats / answers.asked).mean().item()

    def run(cell: Cell) -> Outcome:
        scores = {}
        for length in lengths:
            right, nats = ask(cell.subject, length, cell.seed, True)
            gained = cell.task == "nats gained"
            scores[f"{length:,}"] = ask(cell.subject, length, cell.seed, False)[1] - nats if gained else right
        return Outcome(scores={"raw": scores})

    return Suite(
        name="needles",
        title=f"Needles in a haystack: {title}",
        tasks=("answers right", "nats gained"),
        subjects=chosen("kind of needle", options.tasks, tuple(KINDS)),
        seeds=options.seeds,
        settings={
            "model": name,
            "trained_tokens": trained_tokens,
            "lengths": list(lengths),
            "samples": SAMPLES,
            "filler": [str(path) for path in options.data] or "sentences for needles, documentation strings for facts",
        },
        run=run,
        quantity="share of answers right to the last token, and nats per answer token gained by the needle, by length in tokens",
        unbounded=("nats gained",),
        subject_kind="needle",
        notes=f"{SAMPLES} haystacks per seed, streamed in pieces; trained on {trained_tokens:,} tokens.",
    )


def filler_text(babi: bool, data: tuple[Path, ...], size: int) -> str:
    """At most `size` bytes of the files named, else what a kind of needle hides in by default."""
    if not data and not babi:
        return _NOISE
    documents = [document for path in data for document in read_texts(path)] or docstrings()
    return b"\n\n".join(documents)[:size].decode(errors="replace")
