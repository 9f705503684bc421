"""Streams of a stage server over sockets of its host: who may offer one, and what comes on it."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cluster import Cluster, wait_until

from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.handover import Handover
from gradwire_protocol.local_stream import SendingEnd, connected_pair
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


def test_a_stream_that_is_cut_off_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    serves(cluster)
    before = streams_of(cluster, "B")
    reply, own = offer(cluster, tmp_path)
    assert reply.accepted
    assert streams_of(cluster, "B") == before + 1
    own.close()
    wait_until(lambda: streams_of(cluster, "B") == before)
