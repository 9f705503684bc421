"""The cluster that tests share: most want stage servers in processes of their own, and leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import gradwire


@pytest.fixture(scope="session")
def checkpoint_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared cluster's servers keep checkpoints. Each file of tests has names of its own there."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def four_processes(checkpoint_root: Path) -> Iterator[gradwire.LocalCluster]:
    """Four stage servers. Tests that kill, freeze or add one take a cluster of their own."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # Costs are measured, but not for as long as a long run is worth.
            patch.setenv("GRADWIRE_COORDINATOR_PROFILING_SECONDS", "0.5")
            cluster = stack.enter_context(gradwire.local(stage_servers=4, threads=1, checkpoint_root=checkpoint_root))
        yield cluster
