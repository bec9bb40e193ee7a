"""Labelled sentences: CLINC, Banking77 and DBpedia from their published files, and a synthetic stand-in.

Layouts: CLINC150 a JSON file (`data_full.json`) with lists of [text, intent] under "train" and "test"; Banking77 a directory
with train.csv and test.csv, header text,category; DBpedia 14 a directory with train.csv and test.csv without header, rows of
class number, title, text (and classes.txt, the names).
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hope_megatron.suites.errors import SuiteError

PER_CLASS = 100  # sentences kept of a class, train and test alike
MAX_WORDS = 24  # of a sentence
NUM_WORDS = 1024  # word ids; words share them by hash
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Labelled:
    """Sentences by class: each an array of word ids in [0, NUM_WORDS)."""

    name: str
    train: dict[str, list[np.ndarray]]
    test: dict[str, list[np.ndarray]]

    @property
    def classes(self) -> list[str]:
        """Names, sorted."""
        return sorted(self.train)

    def without_validation(self, seed: int) -> tuple[Labelled, Labelled]:
        """The training sentences in two, a quarter of each class held out: (rest, with the test sentences; held out ones as test).

        A sentence that occurs twice goes to one side with all its copies, and so does none that the test has.
        """
        parts: list[dict[str, list[np.ndarray]]] = [{}, {}]
        for number, name in enumerate(self.classes):
            asked = {words.tobytes() for words in self.test[name]}
            distinct = {w.tobytes(): w for w in self.train[name] if w.tobytes() not in asked}
            order = np.random.default_rng((seed, number)).permutation(len(distinct))
            sentences = [list(distinct.values())[i] for i in order]
            held = max(1, len(sentences) // 4)
            if len(sentences) <= held:
                raise SuiteError(
                    f"{self.name}: class {name!r} has {len(sentences)} training sentences; give at least two"
                )
            parts[0][name], parts[1][name] = sentences[held:], sentences[:held]
        return Labelled(self.name, parts[0], self.test), Labelled(self.name, parts[0], parts[1])


def load_labelled(path: Path) -> Labelled:
    """Read a published file or directory.

    Raises:
        SuiteError: if its layout is none of the three.
    """
    if path.is_file() and path.suffix == ".json":
        train, test = _clinc(path)
    elif (path / "train.csv").is_file() and (path / "test.csv").is_file():
        train, test = (_csv(path / f"{split}.csv", path / "classes.txt") for split in ("train", "test"))
    else:
        raise SuiteError(
            f"{path} is neither CLINC's data_full.json nor a directory with train.csv and test.csv (Banking77, DBpedia)"
        )
    return _labelled(path.stem if path.is_file() else path.name, train, test)


def synthetic_labelled(num_classes: int, seed: int = 0) -> Labelled:
    """Classes told by the words that go together: each has four of 64 words, and a sentence three of these and two of 40 others.

    As in language, no word is of one class alone, so that what is learnt on some classes serves for others.
    """
    rng = np.random.default_rng((77, seed))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = sorted({"".join(rng.choice(letters, 6)) for _ in range(104)})
    rng.shuffle(words)
    common, telling = words[:40], words[40:]
    own = [rng.choice(telling, 4, replace=False) for _ in range(num_classes)]

    def sentence(label: int) -> str:
        told = [*rng.choice(common, 2), *rng.choice(own[label], 3, replace=False)]
        return " ".join(rng.permutation(told))

    splits = [[(sentence(c), f"class {c:03}") for c in range(num_classes) for _ in range(20)] for _ in range(2)]
    return _labelled("synthetic", *splits)


def word_ids(text: str) -> np.ndarray:
    """Lower-case words as hashed ids, at most MAX_WORDS; the same on every machine."""
    words = re.findall(r"\w+", text.lower())[:MAX_WORDS] or [""]
    return np.array([zlib.crc32(word.encode()) % NUM_WORDS for word in words], dtype=np.int64)


def _labelled(name: str, train: Rows, test: Rows) -> Labelled:
    splits: list[dict[str, list[np.ndarray]]] = [{}, {}]
    for split, rows in zip(splits, (train, test)):
        for text, label in rows:
            kept = split.setdefault(label, [])
            if len(kept) < PER_CLASS:
                kept.append(word_ids(text))
    missing = set(splits[0]) ^ set(splits[1])
    if missing or len(splits[0]) < 2:
        raise SuiteError(
            f"{name}: {len(splits[0])} classes in train, {len(splits[1])} in test, {sorted(missing)[:3]} in one of them; give both"
        )
    return Labelled(name, *splits)


def _clinc(path: Path) -> tuple[Rows, Rows]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        splits = [[(str(text), str(label)) for text, label in data[split]] for split in ("train", "test")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuiteError(f'{path} has no lists of [text, intent] under "train" and "test": {error!r}') from None
    return splits[0], splits[1]


def _csv(path: Path, names_file: Path) -> Rows:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        names = names_file.read_text(encoding="utf-8").split() if names_file.is_file() else []
    except (OSError, ValueError, csv.Error) as error:
        raise SuiteError(f"{path} cannot be read as CSV: {error}") from None
    if rows and rows[0] == ["text", "category"]:
        return [(text, label) for text, label in rows[1:]]
    if rows and all(len(row) == 3 and row[0].isdecimal() for row in rows):
        return [(f"{title} {text}", names[int(c) - 1] if int(c) <= len(names) else c) for c, title, text in rows]
    raise SuiteError(
        f"{path}: neither a header text,category (Banking77) nor rows of class number, title, text (DBpedia)"
    )
