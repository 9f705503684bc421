"""Measures a link to another stage server, by messages that grow until they take long enough to tell its rate.

What is made of the numbers is the coordinator's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import grpc

from gradwire_protocol.errors import LimitExceeded, from_rpc_error
from gradwire_protocol.v1 import stage_pb2, stage_pb2_grpc

# Larger messages are slower than what is streamed in chunks.
MAXIMUM_PROBE_BYTES = 4 * 2**20
MAXIMUM_LINKS = 64
# Below what shapers and buffers let through at once: the messages before have used that up when a rate is taken.
_FIRST_BYTES = 16 * 2**10
# A message that takes this long tells the rate, if a shorter one did not take as long for its size.
_LONG_SECONDS = 0.1
_FASTER = 1.2
# All messages one way take no longer than this, but for the last.
_ENOUGH_SECONDS = 2.0
# The last message is sent so often, if it takes less: what else a machine does can only make a link look slower.
_TRIES = 3
# A message that takes longer than this tells that the link has no more than this rate.
_PROBE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_ROUND_TRIPS = 5
_SHORTEST_SECONDS = 1e-6


def measure_link(channel: Any, address: str) -> stage_pb2.LinkMeasurement:
    """Measure the link that a channel goes over; Unreachable if nothing answers there."""
    stub = stage_pb2_grpc.StageServiceStub(channel)  # type: ignore[no-untyped-call]

    def probe(sent: int, received: int) -> float:
        """Return the seconds of a message of so many bytes, and its answer."""
        request = stage_pb2.ProbeRequest(payload=noise(sent), reply_bytes=received)
        started = time.perf_counter()
        stub.Probe(request, timeout=_PROBE_SECONDS)
        return time.perf_counter() - started

    try:
        # Connects.
        stub.Probe(stage_pb2.ProbeRequest(), timeout=_CONNECT_SECONDS, wait_for_ready=True)
        round_trip = min(probe(0, 0) for _ in range(_ROUND_TRIPS))
        return stage_pb2.LinkMeasurement(
            address=address,
            round_trip_seconds=round_trip,
            sent_bytes_per_second=_rate(lambda size: probe(size, 0), round_trip),
            received_bytes_per_second=_rate(lambda size: probe(0, size), round_trip),
        )
    except grpc.RpcError as error:
        raise from_rpc_error(error, target=f"the stage server at {address}") from error


def answer(request: stage_pb2.ProbeRequest) -> stage_pb2.ProbeReply:
    """Answer a probe. LimitExceeded if it is too large, or asks for too much."""
    for what, size in (("A probe", len(request.payload)), ("The answer to a probe", request.reply_bytes)):
        if size > MAXIMUM_PROBE_BYTES:
            raise LimitExceeded(f"{what} is too large", expected=f"{MAXIMUM_PROBE_BYTES} bytes at most", got=str(size))
    return stage_pb2.ProbeReply(payload=noise(request.reply_bytes))


def noise(size: int) -> bytes:
    """Return bytes that no link can compress."""
    block = os.urandom(min(size, 2**20))
    return (block * (-(-size // 2**20)))[:size]


def _rate(probe: Callable[[int], float], round_trip: float) -> float:
    """Return bytes a second of a link, from the seconds that a message of so many bytes takes.

    Messages grow as long as that makes them faster: a link with a long delay is slow until its ends have found out how
    much it carries, and what a shaper lets through at once makes the first ones fast.
    """
    size, spent, best = _FIRST_BYTES, 0.0, 0.0
    try:
        while True:
            seconds = probe(size)
            spent += seconds
            if round_trip + _LONG_SECONDS <= seconds < _ENOUGH_SECONDS:
                # A second opinion.
                again = probe(size)
                spent, seconds = spent + again, min(seconds, again)
            rate = size / max(seconds - round_trip, _SHORTEST_SECONDS)
            settled = seconds - round_trip >= _LONG_SECONDS and rate < best * _FASTER
            if settled or spent >= _ENOUGH_SECONDS or size >= MAXIMUM_PROBE_BYTES:
                break
            size, best = size * 2, max(best, rate)
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return size / _PROBE_SECONDS
        raise
    for _ in range(_TRIES - 1):
        if seconds - round_trip < _LONG_SECONDS:
            seconds = min(seconds, probe(size))
    return size / max(seconds - round_trip, _SHORTEST_SECONDS)
