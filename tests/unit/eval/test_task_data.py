"""Every task of the paper, by the harness's own definition, on tiny files in its data set's own schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

import pyarrow
import pyarrow.parquet
from lm_eval.tasks import TaskManager

from hope_megatron.cli import eval_lm
from hope_megatron.cli.main import main
from hope_megatron.eval.paper import AVERAGED, PAPER_TASKS
from hope_megatron.eval.task_data import TASK_DATA, definition_folders

CHOICES = {"text": ["a table", "a river", "a lamp"], "label": ["A", "B", "C"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "wikitext": [{"page": f" = Page {i} = \n Some words , and {i} more . \n"} for i in range(3)],
    "lambada_openai": [{"text": f"he took the {thing} and went to the {thing}"} for thing in ("boat", "lamp", "cup")],
    "piqa": [{"goal": f"open box {i}", "sol1": "lift the lid", "sol2": "eat it", "label": i % 2} for i in range(4)],
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": "A man cuts bread.",
            "ctx_b": "he",
            "ctx": "A man cuts bread. he",
            "endings": ["eats it.", "flies off. [step] Then more.", "sings.", "sleeps."],
            "label": str(i % 4),
        }
        for i in range(4)
    ],
    "winogrande": [
        {"sentence": "The cup is in the box as _ is small.", "option1": "the cup", "option2": "the box", "answer": "1"},
        {"sentence": "Ann thanked Eve as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "arc_easy": [
        {"id": str(i), "question": f"What holds {i} cups?", "choices": CHOICES, "answerKey": "ABC"[i]} for i in range(3)
    ],
    "arc_challenge": [{"id": "x", "question": "What flows?", "choices": CHOICES, "answerKey": "B"}],
    "social_iqa": [
        {
            "context": "Ann fell.",
            "question": "How is Ann?",
            "answerA": "hurt",
            "answerB": "rich",
            "answerC": "tall",
            "label": str(1 + i % 3),
        }
        for i in range(3)
    ],
    "boolq": [
        {"question": "is water wet", "passage": "Water is wet.", "idx": 0, "label": True},
        {"question": "is fire cold", "passage": "Fire is hot.", "idx": 1, "label": False},
    ],
}
PARQUET = ("piqa", "arc_challenge")  # as the hub keeps them; the others are JSON lines


def write_data(directory: Path, tasks: Sequence[str] = tuple(ROWS)) -> Path:
    for task in tasks:
        folder = directory / task
        folder.mkdir(parents=True)
        split = TASK_DATA[task].split
        if task in PARQUET:
            table = pyarrow.Table.from_pylist(ROWS[task])
            pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    return directory


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no data but those of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_the_table_is_what_the_harness_says() -> None:
    manager = TaskManager(include_path=definition_folders(), include_defaults=False)
    assert set(TASK_DATA) == set(PAPER_TASKS)
    for task, data in TASK_DATA.items():
        text = Path(manager.task_index[task].yaml_path).read_text()
        if "include:" in text:  # ARC-challenge is ARC-easy with other questions
            text = text + Path(manager.task_index["arc_easy"].yaml_path).read_text()
        assert f"dataset_path: {data.dataset}\n" in text and f"dataset_name: {data.subset or 'null'}\n" in text
        assert f"{data.split}_split: {data.split}\n" in text


def test_the_page_says_the_same() -> None:
    page = (Path(__file__).parents[3] / "docs/evaluate.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for task, data in TASK_DATA.items():
        (row,) = (row for row in rows if f"`{task}`" in row)
        names = [
            data.split,
            *data.columns,
            data.dataset,
            *([data.subset] if data.subset not in (None, "default") else []),
        ]
        assert all(f"`{name}`" in row for name in names), task


def test_all_tasks_of_the_paper_from_files(opened, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(eval_lm, "open_model", lambda *_: opened)
    data, report = write_data(tmp_path / "data"), tmp_path / "lm.json"
    assert main(["eval", "lm", "tiny", "--tasks", "paper", "--data", str(data), "--json", str(report)]) == 0
    result, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert result["num_documents"] == {task: len(rows) for task, rows in ROWS.items()}
    for task, metric in AVERAGED.items():
        assert 0.0 <= result["tasks"][task][metric]["value"] <= 1.0
    assert result["tasks"]["wikitext"]["word_perplexity"]["value"] > 1.0
    accuracies = [result["tasks"][task][metric]["value"] for task, metric in AVERAGED.items()]
    assert result["average_accuracy"] == pytest.approx(100 * sum(accuracies) / 8)
    assert "| this model, " in shown and "published: 760M on 30B tokens" in shown


def test_examples_come_from_the_split_train(opened, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(eval_lm, "open_model", lambda *_: opened)
    data = write_data(tmp_path / "data", ["boolq"])
    command = ["eval", "lm", "tiny", "--tasks", "boolq", "--data", str(data), "--num-fewshot", "1"]
    assert main(command) == 2
    assert "boolq has no train.jsonl" in capsys.readouterr().err
    (data / "boolq/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["boolq"]))
    assert main(command) == 0


def test_one_error_says_what_to_put_where(opened, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(eval_lm, "open_model", lambda *_: opened)
    data = write_data(tmp_path / "data", ["wikitext", "boolq", "lambada_openai"])
    (data / "boolq/validation.jsonl").write_text(json.dumps({"question": "x", "answer": True}) + "\n")
    (data / "lambada_openai/test.jsonl").write_text("no JSON\n")
    assert main(["eval", "lm", "tiny", "--tasks", "paper", "--data", str(data)]) == 2
    message = capsys.readouterr().err
    assert "the data of 8 tasks are not to be had" in message and "wikitext" not in message
    for task, dataset in {"piqa": "baber/piqa", "arc_easy": "allenai/ai2_arc (ARC-Easy)"}.items():
        assert f"{task}: no {data}/{task}/ with {TASK_DATA[task].split}.jsonl" in message
        assert f"{dataset} is not in the Hugging Face cache" in message
    assert "goal, sol1, sol2, label" in message
    assert "boolq/validation.jsonl lacks the columns passage, label; it has question, answer" in message
    assert "lambada_openai/test.jsonl cannot be read" in message


def test_a_directory_of_data_that_is_none(capsys) -> None:
    assert main(["eval", "lm", "tiny", "--tasks", "paper", "--data", "/no/such"]) == 2
    assert "/no/such is no directory" in capsys.readouterr().err


def test_the_cache_of_the_hub_is_found(opened, tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(eval_lm, "open_model", lambda *_: opened)
    file = write_data(tmp_path / "data", ["boolq"]) / "boolq/validation.jsonl"
    files = {split: str(file) for split in ("train", "validation")}
    cached = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "made"))
    place = (
        tmp_path / "cache/aps___super_glue/boolq/0.0.0" / ("0" * 40)
    )  # where `datasets` keeps what it has downloaded
    place.mkdir(parents=True)
    for split in files:
        made = Path(cached[split].cache_files[0]["filename"])
        (place / f"super_glue-{split}.arrow").write_bytes(made.read_bytes())
    info = json.loads((made.parent / "dataset_info.json").read_text())
    info |= {"dataset_name": "super_glue", "config_name": "boolq", "builder_name": "parquet"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    assert main(["eval", "lm", "tiny", "--tasks", "boolq"]) == 0
