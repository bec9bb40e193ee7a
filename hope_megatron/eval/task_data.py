"""Data of the paper's tasks from files in a directory, and one message for all that are missing.

    DIR/piqa/validation.jsonl            JSON lines, or
    DIR/piqa/validation-*.parquet        the files of the Hugging Face data set as they are

The definition of a task stays the harness's own: only the place of its data is overlaid.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks

FORMATS = {"jsonl": "json", "json": "json", "parquet": "parquet"}
"""What `datasets` calls the reader of a file, by its suffix."""


class HarnessError(ValueError):
    """A task that the harness does not know, or whose data are not on this machine."""

    is_user_error = True


@dataclass(frozen=True)
class TaskData:
    """What a task of the harness reads.

    Attributes:
        folder: of its definition, in the harness.
        dataset: the data set on the Hugging Face hub.
        subset: its configuration there, if it has several.
        split: what is evaluated.
        columns: that the task uses.
    """

    folder: str
    dataset: str
    subset: str | None
    split: str
    columns: tuple[str, ...]


TASK_DATA = {
    "wikitext": TaskData("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", ("page",)),
    "lambada_openai": TaskData("lambada", "EleutherAI/lambada_openai", "default", "test", ("text",)),
    "piqa": TaskData("piqa", "baber/piqa", None, "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": TaskData(
        "hellaswag", "Rowan/hellaswag", None, "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "winogrande": TaskData(
        "winogrande", "allenai/winogrande", "winogrande_xl", "validation", ("sentence", "option1", "option2", "answer")
    ),
    "arc_easy": TaskData("arc", "allenai/ai2_arc", "ARC-Easy", "test", ("question", "choices", "answerKey")),
    "arc_challenge": TaskData("arc", "allenai/ai2_arc", "ARC-Challenge", "test", ("question", "choices", "answerKey")),
    "social_iqa": TaskData(
        "siqa", "lighteval/siqa", None, "validation", ("context", "question", "answerA", "answerB", "answerC", "label")
    ),
    "boolq": TaskData("super_glue/boolq", "aps/super_glue", "boolq", "validation", ("passage", "question", "label")),
}


def definition_folders() -> list[Path]:
    """Where the harness keeps the definitions of these tasks; reading all of its thousands takes long."""
    root = Path(lm_eval.tasks.__file__).parent
    return sorted({root / data.folder for data in TASK_DATA.values()})


@contextmanager
def opened_tasks(manager: Any, tasks: Sequence[str], data_dir: Path | None, few_shot: bool) -> Iterator[list[str]]:
    """What to tell the harness to evaluate, all data known to be there.

    Args:
        manager: the harness's `TaskManager`, which knows the tasks.
        tasks: names.
        data_dir: files of the tasks in `TASK_DATA`, in a folder for each; what has none there comes from the hub's cache.
        few_shot: whether examples are needed, which come from the split `train`.

    Raises:
        HarnessError: naming every task that lacks its data, and what to put where.
    """
    specs, missing = [], []
    with tempfile.TemporaryDirectory() as directory:
        for task in tasks:
            try:
                specs.append(_overlay(manager, task, data_dir, few_shot, Path(directory)))
                manager.load([specs[-1]])
            except (
                OSError,
                HarnessError,
            ) as error:  # OSError: what `datasets` raises without a network, a cache or the file
                missing.append(f"  {task}: {_reason(task, data_dir, error)}")
                if isinstance(error, ConnectionError):
                    _ask_the_cache_alone()
        if missing:
            raise HarnessError(
                "the data of {} are not to be had:\n{}\nName a directory with such files by --data, or fill the Hugging "
                "Face cache (HF_HOME) on a machine with a network".format(
                    "1 task" if len(missing) == 1 else f"{len(missing)} tasks", "\n".join(missing)
                )
            )
        yield specs


def _overlay(manager: Any, task: str, data_dir: Path | None, few_shot: bool, directory: Path) -> str:
    """The task's name, or a definition of it that reads the files in `data_dir`."""
    data = TASK_DATA.get(task)
    if data is None or data_dir is None or not (data_dir / task).is_dir():
        return task
    splits = [data.split, *(["train"] if few_shot else [])]
    files = {split: _find_files(data_dir / task, split) for split in splits}
    reader = FORMATS[files[data.split][0].suffix[1:]]
    _check_columns(reader, files[data.split], data)
    kinds = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    definition = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": reader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(file) for file in found] for split, found in files.items()}},
        **{kind: split if split in files else None for kind, split in kinds.items()},
    }
    overlay = directory / f"{task}.yaml"
    overlay.write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return str(overlay)


def _find_files(folder: Path, split: str) -> list[Path]:
    for suffix in FORMATS:
        if found := [*folder.glob(f"{split}.{suffix}"), *sorted(folder.glob(f"{split}-*.{suffix}"))]:
            return found
    raise HarnessError(f"{folder} has no {_file_names(split)}")


def _file_names(split: str) -> str:
    return f"{split}.jsonl, {split}.json, {split}.parquet or {split}-*.parquet"


def _check_columns(reader: str, files: Sequence[Path], data: TaskData) -> None:
    import datasets

    try:
        found = datasets.load_dataset(reader, data_files=[str(file) for file in files], split="train").column_names
    except datasets.exceptions.DatasetGenerationError as error:
        raise HarnessError(f"{files[0]} cannot be read: {error.__cause__ or error}") from None
    absent = [column for column in data.columns if column not in found]
    if absent:
        raise HarnessError(f"{files[0]} lacks the columns {', '.join(absent)}; it has {', '.join(found)}")


def _reason(task: str, data_dir: Path | None, error: Exception) -> str:
    first_line = str(error).splitlines()[0]
    data = TASK_DATA.get(task)
    if isinstance(error, HarnessError) or data is None:
        return first_line
    folder = Path("DIR" if data_dir is None else data_dir) / task
    subset = f" ({data.subset})" if data.subset else ""
    return (
        f"no {folder}/ with {_file_names(data.split)} and the columns {', '.join(data.columns)}; and {data.dataset}{subset} "
        f"is not in the Hugging Face cache: {first_line}"
    )


def _ask_the_cache_alone() -> None:
    """No network: every further data set would be waited for as long as this one."""
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
