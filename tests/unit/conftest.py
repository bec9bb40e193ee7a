"""What unit tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def world_of_one() -> None:
    """Process groups of one process. Nobody leaves them: models that another test keeps would be left without groups."""
    from hope_megatron.config.parallel import ParallelConfig
    from hope_megatron.engine.distributed import init_distributed

    init_distributed(ParallelConfig())
