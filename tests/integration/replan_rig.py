"""What tests of planning anew share, as a plugin: servers whose pace is set, and moves that always pay."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster_in_process import Rig, cluster_in_process

from gradwire_coordinator.replan import Basis, NewLayout
from gradwire_coordinator.ways import Servers
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.run_state import RunState
from gradwire_stage.service import StageService

NODE_SECONDS = 0.0005


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("cluster")
    services: list[StageService] = []
    with cluster_in_process(directory, 4, services, heartbeat_seconds=0.2) as cluster:
        yield Rig(cluster, services, directory)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How many half milliseconds a node's forward takes, by server; 1 where nothing is said."""
    factors: dict[str, float] = {}
    make = RunState.__init__

    def make_slow(run: RunState, request: stage_pb2.PrepareRequest, **settings: Any) -> None:
        make(run, request, **settings)
        for segment in request.segments:
            built = run.segments[segment.graph, segment.stage]
            seconds = len(segment.nodes) * NODE_SECONDS * factors.get(run.server, 1.0)
            built.forward = _slowly(built.forward, seconds)  # type: ignore[method-assign]

    monkeypatch.setattr(RunState, "__init__", make_slow)
    return factors


def _slowly(forward: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any, **settings: Any) -> Any:
        time.sleep(seconds)
        return forward(*arguments, **settings)

    return slow


@pytest.fixture
def as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take what was predicted, whatever else this machine does: the model alone decides on cuts."""

    def known(basis: Basis) -> Servers:
        planned = basis.planned
        servers = planned.cut.servers if basis.request.plan.replicas == 1 else planned.known
        return dataclasses.replace(servers, order_is_fixed=True)

    monkeypatch.setattr("gradwire_coordinator.replan._as_measured", known)


@pytest.fixture
def whatever_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout is taken even if no time is saved: by models as small as these there is none to save."""
    monkeypatch.setattr(NewLayout, "pays", lambda layout, minimum_gain: layout.differs)
