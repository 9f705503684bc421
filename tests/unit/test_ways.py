"""Ways to cut a model: unlike servers change places, with all that is known of them; what does not fit is left out."""

from __future__ import annotations

import numpy as np
import pytest
from graph_text import chain_model, plan

from gradwire_coordinator.boundaries import Links
from gradwire_coordinator.costs import MEASURED, NodeCosts, Rates
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.tensor.sharded_model import ShardedModel, shard_model
from gradwire_coordinator.ways import Servers, possible_ways
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import run_pb2

NODES = 12
ADAM = run_pb2.Optimizer(name="Adam")
ADAM.groups.add(parameters=[f"W{i}" for i in range(NODES)])


def sharded(asked: run_pb2.Plan) -> ShardedModel:
    return shard_model(check_model(chain_model(NODES)), asked)


def known(
    slowness: list[float], *, memory: list[int] | None = None, links: Links | None = None, fixed: bool = False
) -> Servers:
    """Each node takes 3 ms on a server of slowness 1, and keeps 100 bytes."""
    each = np.full(NODES + 1, 1e-3)
    return Servers(
        rates=[Rates(flops_per_second=1e9 / factor, bytes_per_second=1e9) for factor in slowness],
        memory_bytes=memory or [0] * len(slowness),
        costs=[
            NodeCosts(2, *(each * factor for _ in range(3)), np.full(NODES + 1, 100), MEASURED) for factor in slowness
        ],
        links=links or {},
        order_is_fixed=fixed,
    )


def test_servers_change_places_with_all_that_is_known_of_them() -> None:
    """1F1B keeps three micro-batches on the first stage: the server with room for them goes there."""
    asked = plan(3, schedule="1f1b", virtual_stages=1, micro_batches=8, expected_rows=16)
    links: Links = {(0, 1): LinkRate(1e9, 1.1e9, 1e-3), (1, 2): LinkRate(1.2e9, 1e9, 2e-3)}
    roomy_last = known([1.0, 1.0, 2.0], memory=[1900, 1900, 4000], links=links)
    (cut,) = possible_ways(asked, ADAM, sharded(asked), roomy_last)
    assert sorted(cut.devices) == [0, 1, 2]
    assert cut.devices[0] == 2
    for place, device in enumerate(cut.devices):
        assert cut.servers.memory_bytes[place] == roomy_last.memory_bytes[device]
        assert cut.servers.rates[place] is roomy_last.rates[device]
        assert cut.servers.costs[place] is roomy_last.costs[device]
    assert cut.way.memory_bytes == tuple(cut.servers.memory_bytes)
    places = {device: place for place, device in enumerate(cut.devices)}
    assert cut.servers.links == {(places[a], places[b]): rate for (a, b), rate in links.items()}
    fixed = known([1.0, 1.0, 2.0], memory=[1900, 1900, 4000], fixed=True)
    (cut,) = possible_ways(asked, ADAM, sharded(asked), fixed)
    assert cut.devices == (0, 1, 2)


def test_like_servers_stay_where_they_are() -> None:
    asked = plan(3, virtual_stages=1)
    (cut,) = possible_ways(asked, ADAM, sharded(asked), known([1.0] * 3, memory=[10**6] * 3))
    assert cut.devices == (0, 1, 2)
    assert cut.gap == 0


def test_a_users_cuts_keep_the_order() -> None:
    asked = plan(2, virtual_stages=1, cuts=[3])
    (cut,) = possible_ways(asked, ADAM, sharded(asked), known([5.0, 1.0]))
    assert cut.devices == (0, 1)
    assert cut.gap is None


def test_error_names_what_would_fit() -> None:
    asked = plan(2, schedule="gpipe", virtual_stages=1, micro_batches=8, expected_rows=8)
    with pytest.raises(PlanError) as caught:
        possible_ways(asked, ADAM, sharded(asked), known([1.0] * 2, memory=[6000] * 2))
    assert "this would fit: " in caught.value.remedy
    assert 'schedule="auto"' in caught.value.remedy
