"""One real Slurm cluster of three nodes for all tests of this folder, and the tiny run that they train."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from local_slurm import LocalSlurm, why_not
from runs import Workspace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip with the reason where the cluster cannot run; HOPE_REQUIRE_SLURM=1 insists."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_not() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.slurm)
        if reason is not None and os.environ.get("HOPE_REQUIRE_SLURM") != "1":
            item.add_marker(pytest.mark.skip(reason=f"no local Slurm cluster: {reason}"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """The cluster. Tests leave all nodes up and the queue empty."""
    reason = why_not()
    if reason is not None:
        pytest.fail(f"HOPE_REQUIRE_SLURM=1, but this machine cannot run a Slurm cluster: {reason}")
    directory = Path(tempfile.mkdtemp(prefix="local-slurm-"))
    directory.chmod(0o755)  # munge insists that everybody could reach its socket; pytest's own directories are closed
    cluster = LocalSlurm(directory, num_nodes=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def workspace(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A directory with text, from which the first chain makes data, and the configuration of a tiny HOPE."""
    directory = tmp_path_factory.mktemp("workspace")
    text = "the memory of a model is its own past and a sample of the stream begins where one before it ended"
    generator = random.Random(0)
    texts = [f'{{"text": "document {i} {" ".join(generator.choices(text.split(), k=80))}"}}\n' for i in range(300)]
    (directory / "text.jsonl").write_text("".join(texts))
    return Workspace(directory, slurm)
