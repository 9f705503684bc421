"""Activations go before the exchange: what each kind of message does on its way to another host."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
import torch

from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.errors import ErrorInterceptor
from gradwire_protocol.frames import FrameAssembler
from gradwire_protocol.serving import register_with_raw_streams
from gradwire_protocol.v1 import stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import CpuDevice
from gradwire_stage.keys import Key
from gradwire_stage.mailbox import Mailbox
from gradwire_stage.peers import _GIVE_WAY_SECONDS, SEND_BYTES, Peers
from gradwire_stage.shared_memory import SharedMemory


class Receiver(stage_pb2_grpc.StageServiceServicer):
    """A peer that takes activations only while `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.came: list[tuple[int, float]] = []

    def Deliver(self, requests: Iterator[bytes], context: Any) -> Iterator[pb.Receipt]:
        assembler = FrameAssembler()
        for frame in requests:
            message = assembler.feed(frame)
            direction = (message or assembler).header.key.direction
            if direction == pb.DIRECTION_FORWARD:
                self.open.wait()
            self.came.append((direction, time.monotonic()))
            if message is not None:
                yield pb.Receipt(sequence=message.header.sequence)


class Wired:
    def __init__(self) -> None:
        self.receiver = Receiver()
        self.server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
        register_with_raw_streams(
            stage_pb2_grpc.add_StageServiceServicer_to_server, self.receiver, self.server, raw_requests=["Deliver"]
        )
        self.address = bind(self.server, "127.0.0.1:0")
        self.server.start()
        self.peers = Peers(
            run="r",
            generation=1,
            own="A",
            addresses={"B": self.address},
            open_channel=open_channel,
            mailbox=Mailbox(2**20, [].append),
            device=CpuDevice(1),
            shared_memory=SharedMemory.off(),
            send_bytes=SEND_BYTES,
            checksums=False,
            pause=contextlib.nullcontext,
            on_frame=lambda: None,
            on_sent=lambda server, delivered: None,
            on_failure=lambda error: None,
        )
        self._sent = 0

    def send(self, direction: pb.Direction, elements: int) -> None:
        self._sent += 1
        self.peers.send(["B"], Key(1, self._sent, "x", direction, 0), torch.zeros(elements))

    def arrived(self, direction: pb.Direction, count: int) -> list[float]:
        """Return when frames came, once there are so many."""
        deadline = time.monotonic() + 10
        while True:
            times = [at for kind, at in list(self.receiver.came) if kind == direction]
            if len(times) >= count:
                return times
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def hold_up(self) -> None:
        """Send an activation that does not arrive, after some that have told how long one takes."""
        for sent in range(3):
            self.send(pb.DIRECTION_FORWARD, 1024)
            self.arrived(pb.DIRECTION_FORWARD, sent + 1)
        self.receiver.open.clear()
        self.send(pb.DIRECTION_FORWARD, 1024)
        (sender,) = self.peers._senders.values()
        deadline = time.monotonic() + 10
        while not sender.is_held_up:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def services_of_connections(self) -> list[int]:
        """Return the type of service of this process's connections to the receiver."""
        found = []
        _, port = self.address.rsplit(":", 1)
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.getpeername()[1] == int(port):
                    found.append(connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS))
        return found

    def close(self) -> None:
        self.receiver.open.set()
        self.peers.cancel()
        self.server.stop(None).wait()


@pytest.fixture
def wired() -> Iterator[Wired]:
    made = Wired()
    yield made
    made.close()


def test_the_exchange_waits_while_activations_are_held_up_and_not_for_ever(wired: Wired) -> None:
    wired.hold_up()
    began = time.monotonic()
    wired.send(pb.DIRECTION_REDUCE, 3 * 2**18)
    times = wired.arrived(pb.DIRECTION_REDUCE, 3)
    assert times[-1] - began >= 3 * _GIVE_WAY_SECONDS
    assert len(wired.arrived(pb.DIRECTION_FORWARD, 3)) == 3
    wired.receiver.open.set()
    wired.arrived(pb.DIRECTION_FORWARD, 4)


def test_the_exchange_goes_on_when_the_activation_has_arrived(wired: Wired) -> None:
    wired.hold_up()
    frames = 40
    began = time.monotonic()
    wired.send(pb.DIRECTION_REDUCE, frames * 2**18)
    wired.arrived(pb.DIRECTION_REDUCE, 1)
    wired.receiver.open.set()
    times = wired.arrived(pb.DIRECTION_REDUCE, frames)
    assert times[-1] - began < frames * _GIVE_WAY_SECONDS


def test_only_the_exchange_tells_the_network_that_it_may_wait(wired: Wired) -> None:
    wired.send(pb.DIRECTION_FORWARD, 8)
    wired.arrived(pb.DIRECTION_FORWARD, 1)
    assert set(wired.services_of_connections()) == {0}
    wired.send(pb.DIRECTION_REDUCE, 8)
    wired.arrived(pb.DIRECTION_REDUCE, 1)
    assert set(wired.services_of_connections()) == {0, 8}
