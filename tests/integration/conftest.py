"""The cluster that tests share: most want stage servers in processes of their own, and leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kept_exports import KeptExports

import gradwire
from docker_engine import Docker, NoEngine
from docker_images import engine_with_images


@pytest.fixture(scope="session", autouse=True)
def exports_are_kept() -> Iterator[None]:
    """Export each kind of model once: an export takes longer than the short runs of most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradwire.run_request.export_model", KeptExports().export)
        yield


@pytest.fixture(scope="session", autouse=True)
def costs_are_measured_briefly() -> Iterator[None]:
    """By every coordinator that tests start: not for as long as a long run is worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWIRE_COORDINATOR_PROFILING_SECONDS", "0.5")
        yield


@pytest.fixture(scope="session")
def checkpoint_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared cluster's servers keep checkpoints. Each file of tests has names of its own there."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def four_processes(checkpoint_root: Path) -> Iterator[gradwire.LocalCluster]:
    """Four stage servers. Tests that kill, freeze or add one take a cluster of their own."""
    with gradwire.local(stage_servers=4, threads=1, checkpoint_root=checkpoint_root) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """A Docker engine that has Gradwire's images."""
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(engine_with_images())
        except NoEngine as reason:
            pytest.skip(str(reason))
        yield engine
