"""How fast the links between servers are: asked of the servers themselves, and remembered for a while.

Leaves to others: what follows from it (`codec_choice.py`), and measuring (gradwire_stage.links).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grpc

from gradwire_protocol.errors import FrameError, GradwireError, from_rpc_error
from gradwire_protocol.v1 import stage_pb2, stage_pb2_grpc

# Networks change, but a user who starts run after run should not wait for this each time.
REMEMBERED_SECONDS = 300.0
_MEASURE_SECONDS = 30.0


@dataclass(frozen=True)
class LinkRate:
    """A link between two servers, in bytes a second each way."""

    forward: float
    backward: float
    round_trip_seconds: float

    def __str__(self) -> str:
        return (
            f"link {_megabits(self.forward)} Mbit/s forward, {_megabits(self.backward)} back, "
            f"round trip {self.round_trip_seconds * 1e3:.1f} ms"
        )


class LinkBook:
    """Measured links by their ends' addresses. Thread-safe."""

    def __init__(self, connect: Callable[[str], Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[LinkRate, float]] = {}

    def rates(self, links: Sequence[tuple[str, str]]) -> list[LinkRate | GradwireError]:
        """Return the rate of each link from one server to another, or why it could not be measured.

        A server takes part in one measurement at a time.
        """
        found: dict[tuple[str, str], LinkRate | GradwireError] = {}
        open_ones = list(dict.fromkeys(links))
        while open_ones:
            busy: set[str] = set()
            now = []
            for link in open_ones:
                if busy.isdisjoint(link):
                    now.append(link)
                    busy.update(link)
            with ThreadPoolExecutor(len(now), thread_name_prefix="measure") as pool:
                found.update(zip(now, pool.map(lambda link: self._rate(*link), now), strict=True))
            open_ones = [link for link in open_ones if link not in found]
        return [found[link] for link in links]

    def _rate(self, sender: str, receiver: str) -> LinkRate | GradwireError:
        now = self._clock()
        with self._lock:
            self._known = {
                link: (rate, at) for link, (rate, at) in self._known.items() if now - at < REMEMBERED_SECONDS
            }
            known = self._known.get((sender, receiver))
        if known is not None:
            return known[0]
        try:
            rate = self._measure(sender, receiver)
        except GradwireError as error:
            return error
        with self._lock:
            self._known[sender, receiver] = (rate, self._clock())
        return rate

    def _measure(self, sender: str, receiver: str) -> LinkRate:
        request = stage_pb2.MeasureLinksRequest(addresses=[receiver])
        with closing(self._connect(sender)) as channel:
            stub = stage_pb2_grpc.StageServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                reply = stub.MeasureLinks(request, timeout=_MEASURE_SECONDS)
            except grpc.RpcError as error:
                raise from_rpc_error(error, target=f"the stage server at {sender}") from error
        numbers = [
            number
            for link in reply.links
            for number in (link.sent_bytes_per_second, link.received_bytes_per_second, link.round_trip_seconds)
        ]
        if len(numbers) != 3 or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise FrameError(f"The stage server at {sender} measured nothing sensible", got=str(numbers[:6]))
        return LinkRate(*numbers)


def _megabits(bytes_per_second: float) -> str:
    megabits = bytes_per_second * 8 / 1e6
    return f"{megabits:,.0f}" if megabits >= 100 else f"{megabits:.1f}" if megabits >= 1 else f"{megabits:.3f}"
