"""A sender and a receiver of shared memory with a real server for the offers, which tests of either share."""

import contextlib
import os
import threading
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest

from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.errors import ErrorInterceptor
from gradwire_protocol.v1 import stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings, SharedSender, offers_to
from gradwire_stage.shared_receiver import SharedReceiver

KIB, MIB = 2**10, 2**20
STREAM = object()


class Peer(stage_pb2_grpc.StageServiceServicer):
    """A server that takes blocks with what `receiver` is at the time."""

    def __init__(self, receiver):
        self.receiver = receiver
        self.offers = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def OfferSharedBlock(self, request, context):
        self.offers.append(request)
        self.entered.set()
        self.gate.wait(10)
        return self.receiver.take_over(request)


class Pair:
    """Both sides, and what they say."""

    def __init__(
        self, directory, maximum_bytes=64 * MIB, receiving_directory=None, receiving=True, threshold_bytes=256 * KIB
    ):
        self.fallbacks = []
        self.memory = SharedMemory(
            SharedMemorySettings(directory=directory, maximum_bytes=maximum_bytes, threshold_bytes=threshold_bytes),
            self.fallbacks.append,
        )
        other = SharedMemorySettings(directory=receiving_directory or directory, maximum_bytes=0)
        self.receiver = SharedReceiver(SharedMemory(other if receiving else None, pytest.fail), ["a"], 1024 * MIB)
        self.peer = Peer(self.receiver)
        self.server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
        self.serve()
        self.channel = open_channel(self.address)
        self.sender = self.new_sender()

    def serve(self):
        stage_pb2_grpc.add_StageServiceServicer_to_server(self.peer, self.server)
        self.address = bind(self.server, "127.0.0.1:0")
        self.server.start()

    def new_sender(self, server="a"):
        about = stage_pb2.OfferSharedBlockRequest(run="r", generation=1, server=server)
        return SharedSender(self.memory, about, "the peer", offers_to(self.channel))

    def send(self, size, seed=0):
        """Return (what was sent, where it is); the latter is None if it has to go in chunks."""
        payload = memoryview(np.random.default_rng(seed).integers(0, 256, size, np.uint8))
        header = pb.TensorHeader(tensor=pb.TensorInfo(size_bytes=size))
        placed = self.sender.place(header, payload)
        assert placed == header.tensor.HasField("shared")
        return payload, (header.tensor.shared if placed else None)

    def passes(self, size, seed=0):
        """Send and take; return whether it went through shared memory."""
        sent, shared = self.send(size, seed)
        return shared is not None and self.receiver.payload(shared, size, STREAM) == sent

    def close(self):
        self.peer.gate.set()
        self.sender.close()
        self.receiver.close()
        self.channel.close()
        self.server.stop(None).wait()


@contextlib.contextmanager
def pairs(directory):
    """What makes pairs, which end with it."""
    with contextlib.ExitStack() as stack:

        def made(*arguments, kind=Pair, **options):
            pair = kind(directory, *arguments, **options)
            stack.callback(pair.close)
            return pair

        yield made


def held_resources():
    """(Mappings, descriptors) of blocks in this process."""
    mappings = sum("memfd:gradwire" in line for line in Path("/proc/self/maps").read_text().splitlines())
    descriptors = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            descriptors += "memfd:gradwire" in os.readlink(f"/proc/self/fd/{name}")
    return mappings, descriptors
