from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.corpus import Rejected
from data_pipeline.dedup import NearDuplicates, SeenDocuments, minhash
from data_pipeline.filters import Filters, letter_ratio, repeated_line_ratio


@pytest.mark.parametrize(
    ("text", "filters", "reason"),
    [
        ("", Filters(), "empty"),
        (" \n\t\u3000", Filters(), "empty"),
        ("a\0b", Filters(), "nul_byte"),
        ("abcd", Filters(min_chars=5), "too_short"),
        ("abcde", Filters(min_chars=5), None),
        ("abcd", Filters(max_chars=3), "too_long"),
        ("x = 1\n" * 3 + "y", Filters(max_repeated_lines=0.5), "repeated_lines"),
        ("x = 1\n" * 3 + "y", Filters(max_repeated_lines=0.7), None),
        ("1 2 3 a", Filters(min_letters=0.3), "few_letters"),
        ("1 2 a \u4e2d", Filters(min_letters=0.5), None),
    ],
)
def test_rules_reject_by_name(text: str, filters: Filters, reason: str | None) -> None:
    if reason is None:
        filters.check(text)
    else:
        with pytest.raises(Rejected, match=reason):
            filters.check(text)


def test_ratios() -> None:
    assert repeated_line_ratio("ab\nab\n\ncd") == pytest.approx(2 / 6)
    assert repeated_line_ratio("\n\n") == 0.0
    assert letter_ratio("a1 b2") == 0.5
    assert letter_ratio("  ") == 0.0


@given(st.text(max_size=300))
def test_ratios_are_parts_of_a_whole(text: str) -> None:
    assert 0.0 <= repeated_line_ratio(text) <= 1.0
    assert 0.0 <= letter_ratio(text) <= 1.0


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize("changes", [0, 2, 10, 40, 200])
def test_minhash_estimates_the_jaccard_similarity(changes: int) -> None:
    generator = random.Random(changes)
    words = [f"w{generator.randrange(5000)}" for _ in range(600)]
    other = list(words)
    for place in generator.sample(range(600), changes):
        other[place] = "changed"
    exact = len(shingles(words) & shingles(other)) / len(shingles(words) | shingles(other))
    estimate = (minhash(" ".join(words)) == minhash(" ".join(other))).mean()
    assert abs(estimate - exact) < 0.13  # three standard deviations of 128 hashes at the worst
    found = NearDuplicates(threshold=0.8)
    found.add(minhash(" ".join(words)))
    if exact > 0.92 or exact < 0.6:
        assert found.is_duplicate(minhash(" ".join(other))) == (exact > 0.8)


def test_short_texts_without_words_are_told_apart() -> None:
    found = NearDuplicates(threshold=0.8)
    found.add(minhash("+++"))
    assert found.is_duplicate(minhash("+++")) and not found.is_duplicate(minhash("---"))
    found.add(minhash("one two"))
    assert found.is_duplicate(minhash("One  TWO!")) and not found.is_duplicate(minhash("one three"))


def test_seen_documents_are_found_again_after_a_restart(tmp_path: Path) -> None:
    def digest(number: int) -> bytes:
        return bytes([number]) * 32

    seen = SeenDocuments(tmp_path, exact=True, near_threshold=0.8)
    assert seen.admit(digest(1), minhash("the first of all texts here")) is None
    sizes = seen.commit()
    assert seen.admit(digest(2), minhash("quite another one follows it")) is None  # after the commit: will be lost
    seen.close()
    again = SeenDocuments(tmp_path, exact=True, near_threshold=0.8, sizes=sizes)
    assert again.admit(digest(1), minhash("whatever")) == "duplicate"
    assert again.admit(digest(3), minhash("The first, of all texts: here")) == "near_duplicate"
    assert again.admit(digest(2), minhash("quite another one follows it")) is None
    again.close()


def test_signatures_are_pinned() -> None:
    """Signatures are stored between runs; a change must also change FORMAT in data_pipeline.prepare."""
    expected = [2642621359, 30790808, 366508837, 1251592616]
    assert minhash("the memory of a model is its own past")[:4].tolist() == expected
    assert minhash("x").dtype == np.uint32
