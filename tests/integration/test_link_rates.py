"""Links, measured by real servers over loopback, and remembered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stage_cluster import StageServer

from gradwire_coordinator.link_rates import REMEMBERED_SECONDS, LinkBook, LinkRate
from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import GradwireError, LimitExceeded, Unreachable
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.links import MAXIMUM_LINKS, MAXIMUM_PROBE_BYTES, answer, measure_link, noise


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def servers() -> Iterator[list[StageServer]]:
    made = [StageServer(f"link-{index}") for index in range(3)]
    yield made
    for server in made:
        server.stop()


def test_a_link_is_measured_both_ways_in_well_under_a_second_each(servers: list[StageServer]) -> None:
    channel = open_channel(servers[0].address)
    started = time.monotonic()
    found = measure_link(channel, servers[0].address)
    assert time.monotonic() - started < 5
    channel.close()
    assert 0 < found.round_trip_seconds < 0.5
    assert found.sent_bytes_per_second > 1e6
    assert found.received_bytes_per_second > 1e6


def test_rates_of_a_pipeline_are_remembered_for_a_while(servers: list[StageServer]) -> None:
    dialled: list[str] = []

    def connect(address: str) -> Any:
        dialled.append(address)
        return open_channel(address)

    clock = Clock()
    book = LinkBook(connect, clock=clock)
    addresses = [server.address for server in servers]
    links = list(itertools.pairwise(addresses))
    first = book.rates(links)
    assert len(first) == 2
    assert all(isinstance(rate, LinkRate) for rate in first)
    assert sorted(dialled) == sorted(addresses[:2])  # each server measures the link to the next
    assert book.rates(links) == first
    assert len(dialled) == 2
    clock.seconds = REMEMBERED_SECONDS + 1
    book.rates(links)
    assert len(dialled) == 4
    assert book.rates([]) == []


def test_a_link_that_cannot_be_measured_says_why_and_is_tried_again(servers: list[StageServer]) -> None:
    book = LinkBook(open_channel)
    gone = servers[2].address
    servers[2].stop()
    # From a server that is gone.
    found = book.rates([(gone, servers[0].address), (servers[0].address, servers[1].address)])
    assert isinstance(found[0], Unreachable)
    assert isinstance(found[1], LinkRate)
    servers[2] = StageServer("link-2")


def test_limits(servers: list[StageServer]) -> None:
    with pytest.raises(LimitExceeded, match="A probe is too large"):
        answer(stage_pb2.ProbeRequest(payload=bytes(MAXIMUM_PROBE_BYTES + 1)))
    with pytest.raises(LimitExceeded, match="The answer to a probe"):
        servers[0].call("Probe", stage_pb2.ProbeRequest(reply_bytes=2**32 - 1))
    with pytest.raises(LimitExceeded, match="Too many links"):
        servers[0].call("MeasureLinks", stage_pb2.MeasureLinksRequest(addresses=["a:1"] * (MAXIMUM_LINKS + 1)))
    with pytest.raises(GradwireError, match="Not an address"):
        servers[0].call("MeasureLinks", stage_pb2.MeasureLinksRequest(addresses=["nonsense"]))


def test_noise_has_the_size_asked_for() -> None:
    assert [len(noise(size)) for size in (0, 1, 2**20, 2**20 + 1, 3 * 2**20)] == [0, 1, 2**20, 2**20 + 1, 3 * 2**20]
    assert noise(100) != noise(100)


def test_rates_in_words() -> None:
    assert str(LinkRate(1.2e6, 1.2e8, 0.0213)) == "link 9.6 Mbit/s forward, 960 back, round trip 21.3 ms"
    assert "12,000 Mbit/s" in str(LinkRate(1.5e9, 1e4, 1e-4))
    assert "0.080 back" in str(LinkRate(1.5e9, 1e4, 1e-4))
