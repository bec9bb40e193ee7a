"""A checkpoint is compared with the run's model key by key; keys that did not exist when it was written are defaults."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from hope_megatron.checkpoint.format import CheckpointError
from hope_megatron.checkpoint.same_model import check_same_model
from hope_megatron.testing.models import tiny_model


def test_keys_of_a_later_version_are_defaults():
    model = tiny_model().model_dump(mode="json")
    older = copy.deepcopy(model)
    for level in older["cms"]["levels"]:
        for key in [key for key in level if key.startswith("inner_")]:
            del level[key]
    del older["cms"]["connection"]
    check_same_model(SimpleNamespace(path="step-1", config={"model": older}), model)
    older["cms"]["levels"][0]["hidden_size"] = 40
    with pytest.raises(CheckpointError, match=r"cms.levels.0.hidden_size: 40 in the checkpoint, 24 in this run"):
        check_same_model(SimpleNamespace(path="step-1", config={"model": older}), model)
