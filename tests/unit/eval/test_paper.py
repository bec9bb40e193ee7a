"""The published rows stand beside ours, and an average is only of all eight tasks."""

from __future__ import annotations

import pytest

from hope_megatron.eval.paper import AVERAGED, PAPER, average_accuracy, paper_table


def test_average_needs_every_task() -> None:
    accuracies = {task: 0.1 * i for i, task in enumerate(AVERAGED)}
    assert average_accuracy(accuracies) == pytest.approx(35.0)
    del accuracies["boolq"]
    assert average_accuracy(accuracies) is None


def test_our_row_follows_those_of_the_nearest_size() -> None:
    table = paper_table(760_000_000, 21.5, None, None).splitlines()
    assert "760M on 30B" in table[0] and len(table) == 2 + 7 + 1
    assert [cell.strip() for cell in table[-1].split("|")[2:5]] == ["21.50", "-", "-"]
    assert "14.39" in paper_table(1_300_000_000, None, None, None)


def test_hope_leads_the_published_rows() -> None:
    for rows in PAPER.values():
        assert min(rows, key=lambda name: rows[name].wiki) == max(rows, key=lambda name: rows[name].average) == "HOPE"
