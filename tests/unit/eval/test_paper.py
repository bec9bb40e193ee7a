"""The published rows stand beside ours in every column; an average is only of all eight tasks, and nothing is invented."""

from __future__ import annotations

import pytest

from hope_megatron.eval.paper import AVERAGED, PAPER, TASKS, average_accuracy, paper_table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_average_needs_every_task() -> None:
    accuracies = {task: 0.1 * i for i, task in enumerate(AVERAGED)}
    assert average_accuracy(accuracies) == pytest.approx(35.0)
    del accuracies["boolq"]
    assert average_accuracy(accuracies) is None


def test_our_row_follows_those_of_the_nearest_size() -> None:
    lines = paper_table(760_000_000, 21.5, None, {"piqa": 0.7, "boolq": None}).splitlines()
    assert "760M on 30B" in lines[0]
    header, published = cells(lines[0]), [cells(line) for line in lines[2 : 2 + len(PAPER["760M on 30B tokens"])]]
    assert header[1:] == ["Wiki ppl", "LMB ppl", *(f"{short}, %" for _, short in TASKS.values()), "average, %"]
    assert len(header) == 12 and {len(row) for row in published} == {12}
    by_name = {row[0]: row for row in published}
    assert by_name["HOPE"] == ["HOPE", "18.68", "20.07", "38.8", *7 * [""], "52.28"]
    ours = cells(lines[2 + len(published)])
    assert ours == ["this model, 760.0M", "21.50", "", "", "70.0", *6 * [""], ""]
    assert "no source for the paper's figure" in lines[-1]
    assert "14.39" in paper_table(1_300_000_000, None, None, {})
    every = dict.fromkeys(TASKS, 0.5)
    assert cells(paper_table(1, 1.0, 2.0, every).splitlines()[-3])[-1] == "50.00"


def test_hope_leads_the_published_rows() -> None:
    for rows in PAPER.values():
        assert min(rows, key=lambda name: rows[name].wiki) == max(rows, key=lambda name: rows[name].average) == "HOPE"


def test_accuracies_that_are_all_there_give_the_published_average() -> None:
    whole = [row for rows in PAPER.values() for row in rows.values() if len(row.accuracies) == len(TASKS)]
    assert whole
    for row in whole:
        assert sum(row.accuracies.values()) / len(TASKS) == pytest.approx(row.average, abs=0.01)
