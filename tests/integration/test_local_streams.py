"""Streams of a stage server over sockets of its host: who may offer one, and what comes on it."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cluster import Cluster, wait_until

from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import encode_first_frame, encode_frames
from gradwire_protocol.handover import Handover
from gradwire_protocol.local_stream import MAXIMUM_KINDS, SendingEnd, connected_pair
from gradwire_protocol.shared_block import TICKET_BYTES
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings

VALUE = torch.arange(8, dtype=torch.float64).view(2, 4)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    fallbacks: list[str] = []
    settings = SharedMemorySettings(directory=tmp_path, maximum_bytes=2**24)
    with Cluster({"A": [0], "B": [1, 2]}, shared_memory=SharedMemory(settings, fallbacks.append)) as made:
        made.open()
        yield made
    assert fallbacks == []


def offer(cluster: Cluster, directory: Path, **change: Any) -> tuple[stage_pb2.OfferStreamReply, socket.socket]:
    """Offer server B a socket as A would, but for `change`; return the answer and this end of it."""
    own, other = connected_pair()
    ticket = secrets.token_bytes(TICKET_BYTES)
    with other, Handover(directory) as handover:
        request = stage_pb2.OfferStreamRequest(run="r", generation=1, server="A", socket=handover.name, ticket=ticket)
        for name, value in change.items():
            setattr(request, name, value)
        call = cluster.servers["B"].stub.OfferStream.future(request, timeout=10)
        handover.serve(ticket, lambda: os.dup(other.fileno()), call.done)
        return call.result(), own


def serves(cluster: Cluster) -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    cluster.submit_step(x, x, 2)
    assert cluster.loss(cluster.reports()) > 0


def streams_of(cluster: Cluster, name: str) -> float:
    count: float = cluster.servers[name].metric("gradwire_local_streams")
    return count


def test_messages_between_servers_go_over_sockets(cluster: Cluster) -> None:
    serves(cluster)
    assert all(streams_of(cluster, name) >= 1 for name in cluster.servers)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "other"}, "other-run"),
        ({"generation": 2}, "other-run"),
        ({"server": "C"}, "other-run"),
        ({"ticket": b"short"}, "failed"),
        ({"socket": "../../etc/passwd"}, "failed"),
        ({"socket": "0" * 32}, "other-host"),
    ],
)
def test_an_offer_that_cannot_be_right_is_refused(
    cluster: Cluster, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    reply, own = offer(cluster, tmp_path, **change)
    own.close()
    assert not reply.accepted
    assert reply.reason == reason
    assert reply.explanation
    serves(cluster)


def test_a_wrong_ticket_gets_nothing(cluster: Cluster, tmp_path: Path) -> None:
    reply, own = offer(cluster, tmp_path, ticket=secrets.token_bytes(TICKET_BYTES))
    own.close()
    assert (reply.accepted, reply.reason) == (False, "failed")


def test_what_is_handed_over_must_be_a_socket(cluster: Cluster, tmp_path: Path) -> None:
    ticket = secrets.token_bytes(TICKET_BYTES)
    with Handover(tmp_path) as handover:
        request = stage_pb2.OfferStreamRequest(run="r", generation=1, server="A", socket=handover.name, ticket=ticket)
        call = cluster.servers["B"].stub.OfferStream.future(request, timeout=10)
        handover.serve(ticket, lambda: os.open("/dev/null", os.O_RDONLY), call.done)
        assert (call.result().accepted, call.result().reason) == (False, "failed")
    serves(cluster)


def test_a_malformed_message_ends_the_stream_with_its_reason_and_the_server_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    reply, own = offer(cluster, tmp_path)
    assert reply.accepted
    end = SendingEnd(own)
    key = pb.MessageKey(run="r", generation=1, entry=9, value="h", direction=pb.DIRECTION_FORWARD)
    header = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(VALUE))
    for frame in encode_frames(header, payload_of(VALUE)):
        end.write(frame)
    end.write(b"")
    receipts = end.receipts()
    assert [sequence for sequence, _ in next(receipts)] == [1]
    end.write(b"\xff")
    with pytest.raises(FrameError, match="not a TensorFrame"):
        next(receipts)
    end.cancel()
    end.release()
    end.release()
    serves(cluster)


class Offered:
    """A stream to server B that A might send over, and what B answers."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        reply, own = offer(cluster, directory)
        assert reply.accepted
        self.end = SendingEnd(own)
        self._receipts = self.end.receipts()
        self._written = 0

    def first(self, value: torch.Tensor = VALUE, kind: str | None = "h", **key: Any) -> None:
        """Write a whole message, the first of a kind."""
        self._written += 1
        fields: dict[str, Any] = {"run": "r", "generation": 1, "entry": 9, "value": "h"}
        named = pb.MessageKey(direction=pb.DIRECTION_FORWARD, **fields | key)
        header = pb.TensorHeader(key=named, sequence=self._written, tensor=tensor_info(value))
        assert not self.end.try_write(encode_first_frame(header, payload_of(value)), kind)

    def short(self, micro_batch: int, *, number: int = 0, entry: int = 9, payload: bytes = bytes(64)) -> None:
        self._written += 1
        assert not self.end.try_write_short(number, entry, micro_batch, memoryview(payload))

    def receipts(self) -> list[int]:
        """Return the receipts of what was written since the last call; raise the receiver's error, if it has one."""
        # The server may have ended the stream already: then it has said why.
        with suppress(BrokenPipeError):
            self.end.write(b"")
        found: list[int] = []
        while not found or found[-1] < self._written:
            found += [sequence for sequence, _ in next(self._receipts)]
        return found

    def close(self) -> None:
        self.end.cancel()
        self.end.release()
        self.end.release()


@pytest.fixture
def offered(cluster: Cluster, tmp_path: Path) -> Iterator[Offered]:
    made = Offered(cluster, tmp_path)
    yield made
    made.close()
    serves(cluster)


def received(cluster: Cluster) -> float:
    labels = {"run": "r", "peer": "A", "direction": "received", "kind": "forward", "codec": "none"}
    return cluster.servers["B"].metric("gradwire_transfer_bytes_total", **labels) or 0


def dropped(cluster: Cluster, reason: str) -> float:
    return cluster.servers["B"].metric("gradwire_messages_dropped_total", reason=reason) or 0


def test_short_frames_are_messages_like_others(cluster: Cluster, offered: Offered) -> None:
    offered.first()
    for micro_batch in range(1, 4):
        offered.short(micro_batch)
    assert offered.receipts() == [1, 2, 3, 4]
    assert received(cluster) == 4 * 64
    before = dropped(cluster, "repeated")
    offered.short(3)
    assert offered.receipts() == [5]
    assert dropped(cluster, "repeated") == before + 1
    assert received(cluster) == 4 * 64


def test_short_frames_of_another_run_are_dropped_one_by_one(cluster: Cluster, offered: Offered) -> None:
    before = dropped(cluster, "other-run")
    offered.first(run="other")
    offered.short(1)
    offered.short(2)
    offered.first(kind=None)  # sequences count on
    assert offered.receipts() == [1, 2, 3, 4]
    assert dropped(cluster, "other-run") == before + 3
    assert received(cluster) == 64


def test_a_kind_whose_first_message_came_late_is_one_all_the_same(cluster: Cluster, offered: Offered) -> None:
    serves(cluster)
    finished, before = cluster.entry, received(cluster)
    offered.first(entry=finished)
    offered.short(1, entry=finished + 50)
    assert offered.receipts() == [1, 2]
    assert dropped(cluster, "late") >= 1
    assert received(cluster) == before + 64


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"number": 1}, "unknown kind"),
        ({"entry": 0}, "does not fit its kind"),
        ({"payload": bytes(63)}, "does not fit its kind"),
        ({"payload": bytes(65)}, "does not fit its kind"),
    ],
)
def test_a_short_frame_that_fits_no_kind_ends_the_stream(
    cluster: Cluster, offered: Offered, change: dict[str, Any], match: str
) -> None:
    offered.first()
    offered.short(1, **change)
    with pytest.raises(FrameError, match=match):
        offered.receipts()


def test_a_short_frame_inside_a_message_ends_the_stream(offered: Offered) -> None:
    offered.first()
    key = pb.MessageKey(run="r", generation=1, entry=9, micro_batch=1, value="h", direction=pb.DIRECTION_FORWARD)
    header = pb.TensorHeader(key=key, sequence=2, tensor=tensor_info(VALUE))
    offered.end.write(encode_first_frame(header, None))
    offered.short(2)
    with pytest.raises(FrameError, match="inside a message"):
        offered.receipts()


def test_the_first_of_a_kind_must_be_whole(offered: Offered) -> None:
    offered.first(value=torch.zeros(0, 4, dtype=torch.float64))
    with pytest.raises(FrameError, match="not one frame with a payload"):
        offered.receipts()


def test_too_many_kinds_end_the_stream(cluster: Cluster, offered: Offered) -> None:
    for number in range(MAXIMUM_KINDS):
        offered.first(run="other", kind=f"kind {number}")
    offered.receipts()
    offered.end._kinds.clear()
    offered.first(run="other", kind="one more")
    with pytest.raises(FrameError, match="Too many kinds"):
        offered.receipts()


def test_what_cannot_have_a_gradient_is_refused_before_it_is_a_kind(offered: Offered) -> None:
    key = pb.MessageKey(run="r", generation=1, entry=9, value="h", direction=pb.DIRECTION_FORWARD)
    value = torch.arange(8)
    header = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(value))
    header.tensor.requires_grad = True
    offered.end.try_write(encode_first_frame(header, payload_of(value)), "h")
    with pytest.raises(FrameError, match="cannot have a gradient"):
        next(offered._receipts)


def test_a_stream_that_is_cut_off_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    serves(cluster)
    before = streams_of(cluster, "B")
    reply, own = offer(cluster, tmp_path)
    assert reply.accepted
    assert streams_of(cluster, "B") == before + 1
    own.close()
    wait_until(lambda: streams_of(cluster, "B") == before)
