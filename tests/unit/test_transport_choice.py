"""What moves the sums of shards and replicas, by plan, hosts and devices; and why."""

from __future__ import annotations

from typing import Any

import pytest
from graph_text import plan
from sharded_samples import server

from gradwire_coordinator.sharing import ChosenCodec, Sharing
from gradwire_coordinator.tensor_groups import Unit
from gradwire_coordinator.transport_choice import Transport, choose_transport
from gradwire_protocol.errors import PlanError
from gradwire_protocol.gradient_codecs import parse_compression

SHARDS: list[list[Unit]] = [[(server(0), server(1))]]
REPLICAS: list[list[Unit]] = [[(server(0),)], [(server(1),)]]
GRID: list[list[Unit]] = [[(server(0), server(1))], [(server(2), server(3))]]
ASKED = "the plan asks for it"


def choose(replicas: list[list[Unit]], codec: str = "", **fields: Any) -> Transport:
    asked = plan(1, tensor=len(replicas[0][0]), replicas=len(replicas), **fields)
    chosen = ChosenCodec(parse_compression(codec), "") if codec else None
    return choose_transport(asked, Sharing.of(asked, "AdamW", chosen), replicas)


@pytest.mark.parametrize("asked", ["", "auto"])
def test_left_open_it_is_grpc(asked: str) -> None:
    for near in (SHARDS, REPLICAS, GRID):
        made = choose(near, transport=asked)
        assert made.name == "grpc"
        assert "share a host" in made.reason
    far = server(9, host="far")
    several: list[list[list[Unit]]] = [
        [[(server(0), far)]],
        [[(server(0),)], [(far,)]],
        [[(server(0), server(1))], [(far, far)]],
    ]
    for apart in several:
        made = choose(apart, transport=asked)
        assert made.name == "grpc"
        assert "between hosts" in made.reason


def test_stages_on_different_hosts_add_up_nothing_with_each_other() -> None:
    far = server(8, host="far"), server(9, host="far")
    assert "share a host" in choose([[(server(0), server(1)), far]]).reason


def test_who_has_nothing_to_add_up_needs_none() -> None:
    for asked in ("auto", "gloo", "nccl"):
        assert choose([[(server(0),)]], transport=asked) == ("", "")


@pytest.mark.parametrize("asked", ["grpc", "gloo"])
def test_what_the_plan_asks_for(asked: str) -> None:
    for servers in (SHARDS, REPLICAS, GRID):
        assert choose(servers, transport=asked) == (asked, ASKED)
    assert choose(REPLICAS, transport=asked, exchange="local") == (asked, ASKED)


def test_what_replicas_encode_goes_as_messages() -> None:
    made = choose(REPLICAS, transport="gloo", compression="int8")
    assert made == ("grpc", "int8 encodes what replicas exchange, which goes as messages")
    made = choose(GRID, transport="gloo", compression="int8")
    assert made == ("gloo", f"{ASKED}; int8 encodes what replicas exchange, which goes as messages")
    # One that is left open counts when it is known.
    assert choose(REPLICAS, "int8", transport="gloo", compression="auto").name == "grpc"
    assert choose(REPLICAS, "none", transport="gloo", compression="auto") == ("gloo", ASKED)


def test_torchs_are_for_one_kind_of_device() -> None:
    for servers in (SHARDS, REPLICAS):
        with pytest.raises(PlanError, match="for servers on cuda devices") as caught:
            choose(servers, transport="nccl")
        assert caught.value.expected == "cuda devices only"
        assert "on cpu" in (caught.value.got or "")
    gpus: list[list[Unit]] = [[(server(0, kind="cuda"),)], [(server(1, kind="cuda"),)]]
    assert choose(gpus, transport="nccl") == ("nccl", ASKED)


def test_parameter_servers_take_messages() -> None:
    assert choose(REPLICAS, transport="grpc", exchange="parameter-server").name == "grpc"
    for replicas in (REPLICAS, [[(server(0),)]]):
        with pytest.raises(PlanError, match="goes as messages") as caught:
            choose(replicas, transport="gloo", exchange="parameter-server")
        assert "leave transport out" in (caught.value.remedy or "")
