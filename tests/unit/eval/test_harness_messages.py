"""What the harness counts travels between processes as it is, without pickles."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

from hope_megatron.eval.harness import as_plain, from_plain
from hope_megatron.eval.task_data import HarnessError


def test_counts_come_back_as_they_were() -> None:
    counts = {
        "wikitext": {("word_perplexity", "none"): [(-3.5, 7), (np.float64(-1.25), np.int64(3))]},
        "boolq": {("acc", "none"): [1.0, 0, True], ("f1", "flexible"): [("ja", "nein"), {"idx": [None]}]},
    }
    assert from_plain(json.loads(json.dumps(as_plain(counts)))) == counts


def test_what_is_no_count_is_named() -> None:
    with pytest.raises(HarnessError, match="values of object"):
        as_plain({"task": [object()]})
