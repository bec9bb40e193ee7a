"""Tests of this folder need a CUDA device; those marked multi_gpu need two. Elsewhere they are skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if HERE not in Path(item.fspath).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if devices < needed:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} CUDA device{'s' * (needed > 1)}, torch sees {devices}")
            )
