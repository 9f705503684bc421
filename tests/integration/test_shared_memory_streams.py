"""Deliver streams of a stage server whose payloads lie in shared memory: true ones, and what no honest peer sends."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from stage_cluster import Cluster, wait_until
from test_shared_memory_kills import blocks_of, descriptors_of

from gradwire_protocol.delivery import DELIVER
from gradwire_protocol.errors import FrameError, GradwireError, from_rpc_error
from gradwire_protocol.frames import FrameAssembler, encode_frames
from gradwire_protocol.handover import Handover
from gradwire_protocol.shared_block import OwnBlock, PeerBlock, padded
from gradwire_protocol.torch_tensors import payload_of, tensor_from, tensor_info
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings

LAYOUT = {"A": [0], "B": [1, 2]}
VALUE = torch.arange(8, dtype=torch.float64).view(2, 4)
SLOTS = 4


class FakePeer:
    """Speaks to server B as if it were A's sender: offers a block, and sends what it likes."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.server = cluster.servers["B"]
        self.directory = directory
        self.block = OwnBlock(SLOTS, padded(1))
        self.sequence = 0
        self.frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call: Any = self.server.channel.stream_stream(
            DELIVER, request_serializer=None, response_deserializer=pb.Receipt.FromString
        )(iter(self.frames.get, None), timeout=30)

    def offer(self, **change: Any) -> stage_pb2.OfferSharedBlockReply:
        with Handover(self.directory) as handover:
            request = stage_pb2.OfferSharedBlockRequest(
                run="r",
                generation=1,
                server="A",
                socket=handover.name,
                ticket=self.block.ticket,
                slots=SLOTS,
                slot_bytes=padded(1),
            )
            for name, value in change.items():
                setattr(request, name, value)
            future = self.server.stub.OfferSharedBlock.future(request, timeout=5)
            handover.serve(self.block.ticket, self.block.allocate, future.done)
            reply: stage_pb2.OfferSharedBlockReply = future.result()
            return reply

    def header(self, entry: int, micro_batch: int, *, run: str = "r", generation: int = 1) -> pb.TensorHeader:
        self.sequence += 1
        return pb.TensorHeader(
            key=pb.MessageKey(
                run=run,
                generation=generation,
                entry=entry,
                micro_batch=micro_batch,
                value="h",
                direction=pb.DIRECTION_FORWARD,
            ),
            sequence=self.sequence,
            tensor=tensor_info(VALUE),
        )

    def send(self, entry: int, micro_batch: int, **identity: Any) -> None:
        """Send a value in the right way, and wait for its receipt."""
        header = self.header(entry, micro_batch, **identity)
        placed = self.block.put(payload_of(VALUE))
        assert placed is not None
        self.announce(header, *placed)
        assert next(self.call).sequence == self.sequence

    def announce(self, header: pb.TensorHeader, slot: int, use: int, ticket: bytes | None = None) -> None:
        header.tensor.shared.block = self.block.ticket if ticket is None else ticket
        header.tensor.shared.slot, header.tensor.shared.use = slot, use
        for frame in encode_frames(header, None):
            self.frames.put(frame)

    def failure(self) -> GradwireError:
        with pytest.raises(grpc.RpcError) as caught:
            next(self.call)
        return from_rpc_error(caught.value)

    def end(self) -> None:
        self.frames.put(None)
        list(self.call)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """In the end, nothing of any block is left in this process."""
    fallbacks: list[str] = []
    settings = SharedMemorySettings(directory=tmp_path, maximum_bytes=2**24, threshold_bytes=1)
    memory = SharedMemory(settings, fallbacks.append)
    with Cluster(LAYOUT, shared_memory=memory) as made:
        made.open()
        yield made
    gc.collect()
    assert fallbacks == []
    assert memory.size_bytes == 0
    assert not blocks_of("self")


@pytest.fixture
def peer(cluster: Cluster, tmp_path: Path) -> Iterator[FakePeer]:
    made = FakePeer(cluster, tmp_path)
    assert made.offer().accepted
    yield made
    made.call.cancel()
    del made.block  # pytest keeps the fixture's value longer than the cluster


def serves(cluster: Cluster) -> None:
    """A step on both servers, with shared memory between them, is as it should be."""
    x = torch.randn(4, 4, dtype=torch.float64)
    cluster.submit_step(x, x, 2)
    assert cluster.loss(cluster.reports()) > 0


def test_slots_come_back_from_messages_that_are_taken_and_from_those_that_are_dropped(
    cluster: Cluster, peer: FakePeer
) -> None:
    serves(cluster)  # so that entry 2 is over
    peer.send(2, 0)
    assert cluster.servers["B"].metric("gradwire_messages_dropped_total", reason="late") == 1
    assert peer.block.free() == SLOTS
    peer.send(50, 0)
    assert peer.block.free() == SLOTS - 1  # it waits to be taken
    peer.send(50, 0)
    assert cluster.servers["B"].metric("gradwire_messages_dropped_total", reason="repeated") == 1
    assert peer.block.free() == SLOTS - 1
    # A slot of a message for nobody is not looked at: that stream is of no use to any run here.
    peer.send(50, 1, generation=2)
    peer.send(50, 2, run="other")
    assert peer.block.free() == SLOTS - 3
    peer.end()
    serves(cluster)


def test_a_message_is_what_was_put_into_its_slot(cluster: Cluster, peer: FakePeer) -> None:
    serves(cluster)
    peer.send(50, 0)
    held = cluster.servers["B"].stage_service.holder.current  # type: ignore[attr-defined]
    arrived, wanted = next(iter(held.run.mailbox._items.values()))[0]
    assert torch.equal(arrived.tensor, VALUE)
    assert not wanted
    del arrived
    held.run.mailbox.finish(60)
    wait_until(lambda: peer.block.free() == SLOTS)
    peer.end()


LIES = {
    "no such slot": lambda peer: peer.announce(peer.header(50, 0), SLOTS, 1),
    "a slot far away": lambda peer: peer.announce(peer.header(50, 0), 2**32 - 1, 1),
    "a use to come": lambda peer: peer.announce(peer.header(50, 0), 0, 2),
    "no use": lambda peer: peer.announce(peer.header(50, 0), 0, 0),
    "unknown block": lambda peer: peer.announce(peer.header(50, 0), 0, 1, bytes(16)),
    "no block": lambda peer: peer.announce(peer.header(50, 0), 0, 1, b""),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lies_about_slots_end_their_stream_only(cluster: Cluster, peer: FakePeer, lie: Any) -> None:
    lie(peer)
    assert type(peer.failure()) is FrameError
    serves(cluster)
    assert cluster.servers["B"].activity().run == "r"


def test_a_payload_that_is_larger_than_its_slot_ends_the_stream(cluster: Cluster, peer: FakePeer) -> None:
    header = peer.header(50, 0)
    header.tensor.CopyFrom(tensor_info(torch.zeros(padded(1) // 8 + 1, dtype=torch.float64)))
    peer.announce(header, 0, 1)
    assert type(peer.failure()) is FrameError
    serves(cluster)


def test_a_slot_cannot_be_used_again_while_its_payload_waits(cluster: Cluster, peer: FakePeer) -> None:
    peer.send(50, 0)
    peer.announce(peer.header(50, 1), 0, 2)
    assert "too early" in str(peer.failure())
    serves(cluster)


def test_a_payload_comes_in_memory_or_in_chunks_not_both(cluster: Cluster, peer: FakePeer) -> None:
    header = peer.header(50, 0)
    header.tensor.shared.block, header.tensor.shared.use = peer.block.ticket, 1
    for frame in encode_frames(header, payload_of(VALUE)):
        peer.frames.put(frame)
    assert "no chunk" in str(peer.failure())
    serves(cluster)


def test_another_stream_cannot_use_the_block(cluster: Cluster, peer: FakePeer, tmp_path: Path) -> None:
    peer.send(50, 0)
    other = FakePeer(cluster, tmp_path)
    other.announce(other.header(50, 1), 1, 1, peer.block.ticket)
    assert "has not been given" in str(other.failure())
    peer.send(50, 2)  # it goes on
    peer.end()
    # A block goes with its stream; what it brought stays.
    later = FakePeer(cluster, tmp_path)
    later.announce(later.header(50, 3), 2, 1, peer.block.ticket)
    assert "has not been given" in str(later.failure())
    serves(cluster)


@pytest.mark.parametrize("ends", ["in order", "cut off", "with an error"])
def test_a_block_is_unmapped_with_its_stream(cluster: Cluster, peer: FakePeer, ends: str) -> None:
    def mappings() -> int:
        return sum("memfd:gradwire" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = mappings()  # the fake peer's own, and the server's
    peer.send(1, 0)  # late: nothing of it stays
    if ends == "in order":
        peer.end()
    elif ends == "cut off":
        peer.call.cancel()
    else:
        peer.frames.put(b"garbage")
        assert type(peer.failure()) is FrameError
    wait_until(lambda: mappings() == before - 1)
    serves(cluster)


def test_offers_of_another_run_generation_or_server_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    for change in ({"run": "other"}, {"generation": 0}, {"generation": 2}, {"server": "B"}, {"server": "Z"}):
        peer = FakePeer(cluster, tmp_path)
        assert peer.offer(**change).reason == "other-run"
        peer.end()
    serves(cluster)


def test_blocks_that_nobody_uses_go_with_the_run(cluster: Cluster, peer: FakePeer) -> None:
    before = descriptors_of("self")
    for _ in range(5):
        other = FakePeer(cluster, peer.directory)
        assert other.offer().accepted
        other.end()
    del other
    gc.collect()
    assert descriptors_of("self") >= before + 5
    for server in cluster.servers.values():
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1, reason="test"))
    peer.call.cancel()
    gc.collect()
    wait_until(lambda: len(blocks_of("self")) == 1)  # the fake peer's own
    peer.block = OwnBlock(1, padded(1))
    gc.collect()
    assert not blocks_of("self")


def test_a_run_ends_while_peers_still_send(cluster: Cluster, peer: FakePeer) -> None:
    """What comes late is receipted and dropped, as without shared memory."""
    peer.send(50, 0)
    for server in cluster.servers.values():
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1, reason="test"))
    peer.send(50, 1)
    peer.end()


def test_thousands_of_messages_leave_no_trace(cluster: Cluster) -> None:
    x = torch.randn(64, 4, dtype=torch.float64)
    counts = []
    for _ in range(12):
        for _ in range(3):
            cluster.submit_step(x, x, 32)  # 64 messages each way, and the exchange
            cluster.reports()
        counts.append((descriptors_of("self"), len(blocks_of("self")), threading.active_count()))
    assert len(set(counts[2:])) == 1
    sent = cluster.servers["A"].metric("gradwire_shared_memory_transfer_bytes_total", run="r", peer="B")
    assert sent is not None
    assert sent > 12 * 3 * 32 * 2 * 4 * 8


# --- the assembler alone


def assemble(header: pb.TensorHeader, shared: Any, payload: memoryview | None = None) -> Any:
    header.sequence = 1
    assembler = FrameAssembler(shared=shared)
    messages = [assembler.feed(frame) for frame in encode_frames(header, payload)]
    assembler.finish()
    return messages


def test_an_assembler_asks_for_what_lies_in_shared_memory() -> None:
    own = OwnBlock(1, padded(64))
    peer = PeerBlock(own.allocate(), own.ticket, 1, padded(64))
    placed = own.put(payload_of(VALUE))
    assert placed is not None
    key = pb.MessageKey(run="r", entry=1, value="h", direction=pb.DIRECTION_FORWARD)
    header = pb.TensorHeader(key=key, tensor=tensor_info(VALUE))
    header.tensor.shared.slot, header.tensor.shared.use = placed
    [message] = assemble(header, lambda slot, size: peer.take(slot.slot, slot.use, size))
    assert torch.equal(tensor_from(message), VALUE)
    [message] = assemble(header, lambda slot, size: None)
    assert (message.payload, message.kept) == (None, False)
    with pytest.raises(FrameError, match="not expected"):
        assemble(header, None)
