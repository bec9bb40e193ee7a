"""What unit tests share."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# What a slow or busy machine makes of it is no fault of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def world_of_one() -> None:
    """Process groups of one process. Nobody leaves them: models that another test keeps would be left without groups."""
    from hope_megatron.config.parallel import ParallelConfig
    from hope_megatron.parallel.distributed import init_distributed

    init_distributed(ParallelConfig())
