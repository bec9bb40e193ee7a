"""Which tokens a context has shown before: against a plain loop, and on sentences."""

from __future__ import annotations

import numpy as np
import torch

from hope_megatron.eval.token_kinds import KINDS, NAMES, loss_by_kind, name_kinds, repetition_kinds


def plain(row: list[int]) -> list[int]:
    """The same by looking back from every target of tokens [T + 1]."""

    def stood_before(at: int, length: int) -> bool:
        """Whether the `length` tokens that end at `at` end earlier too."""
        gram = row[at - length + 1 : at + 1]
        return any(row[end - length + 1 : end + 1] == gram for end in range(length - 1, at))

    return [stood_before(at, 2) + (at >= 3 and stood_before(at, 4)) for at in range(1, len(row))]


def test_repetitions_are_those_of_a_plain_loop() -> None:
    for length in (2, 3, 4, 5, 90):
        rows = torch.randint(0, 4, (6, length), generator=torch.Generator().manual_seed(length))
        kinds = repetition_kinds(rows[:, :-1], rows[:, 1:])
        assert kinds.tolist() == [plain(row) for row in rows.tolist()]
    assert {0, 1, 2} == set(kinds.flatten().tolist())


def test_targets_without_a_loss_complete_nothing() -> None:
    tokens = torch.tensor([[5, 1, 7, 5, 1]])
    for target in (-100, -1):
        assert repetition_kinds(tokens, torch.tensor([[target, 7, 5, 1, 7]])).tolist() == [[0, 0, 0, 0, 1]]


def test_names_are_words_that_only_begin_large() -> None:
    texts = [
        "The",
        " cat",
        " and",
        " Ma",
        "ry",
        " met",
        " the",
        " cat",
        ".",
        " Ma",
        "ry",
        " in",
        "_x",
        "9",
        " up",
        " in",
        "_x",
        "9",
    ]
    ids = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    spelt = {number: text for text, number in ids.items()}
    tokens = np.array([ids[text] for text in texts])

    def decode(numbers: list[int]) -> str:
        return "".join(spelt[number] for number in numbers).lstrip()  # as SentencePiece does

    kinds = name_kinds(tokens, len(tokens) - 1, decode)
    named = [(text, NAMES[kind]) for text, kind in zip(texts[1:], kinds) if kind]
    first, seen = NAMES[1:]
    assert named == [(" Ma", first), ("ry", first), (" Ma", seen), ("ry", seen)] + [
        (text, kind) for kind in (first, seen) for text in (" in", "_x", "9")
    ]
    assert name_kinds(tokens, 9, decode).tolist()[9:11] == [1, 1]  # a new row has seen nothing

    losses = {"model": np.arange(len(kinds), dtype=float)}
    rows = {row["kind"]: row for row in loss_by_kind(losses, tokens, len(kinds), decode)}
    assert rows.keys() == {*KINDS[:2], *NAMES}, "no four tokens stand twice"
    assert sum(rows[kind]["tokens"] for kind in KINDS[:2]) == len(kinds) == sum(rows[kind]["tokens"] for kind in NAMES)
    assert rows[NAMES[0]]["loss"] == {"model": losses["model"][kinds == 0].mean()}
