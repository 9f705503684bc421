"""Senders against a real receiver, over gRPC and over a local socket: order, receipts, back-pressure, failures."""

import socket
import threading
import time
from concurrent import futures

import grpc
import pytest
from local_frames import local_frames

from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.errors import (
    Aborted,
    ErrorInterceptor,
    GradwireError,
    InternalError,
    LimitExceeded,
    Unreachable,
)
from gradwire_protocol.frames import FrameAssembler
from gradwire_protocol.local_stream import QUIET_SECONDS, ReceivingEnd, connected_pair
from gradwire_protocol.serving import register_with_raw_streams
from gradwire_protocol.v1 import stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb


class Receiver(stage_pb2_grpc.StageServiceServicer):
    def __init__(self):
        self.messages = []
        self.gate = threading.Event()
        self.gate.set()
        self.limit = 2**30
        self.started = threading.Event()
        self.ended = threading.Event()
        self.local = None

    def Deliver(self, requests, context):
        for whole in self.take(requests):
            yield pb.Receipt(sequence=whole.header.sequence)

    def take(self, frames):
        self.started.set()
        assembler = FrameAssembler(self.limit)
        try:
            for frame in frames:
                self.gate.wait()
                if message := assembler.feed(frame):
                    self.messages.append(message)
                    yield message
        finally:
            self.ended.set()

    def connect(self):
        own, other = connected_pair()
        self.local = other
        threading.Thread(target=self.serve_local, args=(ReceivingEnd(other),)).start()
        return own

    def serve_local(self, end):
        try:
            for whole in self.take(local_frames(end)):
                end.receipt(whole.header.sequence, whole.header.tensor.size_bytes)
            end.send_receipts()
        except GradwireError as error:
            end.fail(error)
        except OSError:
            pass  # it was cut off
        finally:
            end.close()

    def vanish(self):
        if self.local is not None:
            self.local.shutdown(socket.SHUT_RDWR)
        else:
            self.server.stop(None).wait()

    def sender(self, peer="peer", **options):
        if self.over == "grpc":
            return FrameSender(self.channel, peer, **options)
        at_once = 2**16 if self.over == "socket, at once" else -1
        return FrameSender(self.channel, peer, connect=self.connect, at_once_bytes=at_once, **options)


@pytest.fixture(params=["grpc", "socket", "socket, at once", "no socket"])
def receiver(request):
    servicer = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
    register_with_raw_streams(
        stage_pb2_grpc.add_StageServiceServicer_to_server, servicer, server, raw_requests=["Deliver"]
    )
    address = bind(server, "127.0.0.1:0")
    server.start()
    servicer.server = server
    servicer.channel = open_channel(address)
    servicer.over = request.param
    if request.param == "no socket":
        servicer.connect = lambda: None
    yield servicer
    servicer.gate.set()
    servicer.channel.close()
    server.stop(None).wait()


def message(size, value="x"):
    data = bytes(size)
    key = pb.MessageKey(run="r", generation=1, entry=1, value=value, direction=pb.DIRECTION_FORWARD)
    info = pb.TensorInfo(data_type=pb.DATA_TYPE_UINT8, shape=[size], size_bytes=size, codec=pb.CODEC_NONE)
    return pb.TensorHeader(key=key, tensor=info), memoryview(data)


def wait_until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_messages_arrive_whole_in_order_and_are_receipted(receiver):
    delivered = []
    sender = receiver.sender(on_delivered=delivered.append)
    sizes = [0, 1, 100, 2**20, 2**20 + 1, 3 * 2**20 + 7]
    for number, size in enumerate(sizes):
        sender.send(*message(size, str(number)))
    sender.flush(10)
    assert [m.header.key.value for m in receiver.messages] == [str(n) for n in range(len(sizes))]
    assert [m.payload.nbytes if m.payload else 0 for m in receiver.messages] == sizes
    sender.close()
    assert [d.size_bytes for d in delivered] == sizes
    assert all(d.seconds > 0 for d in delivered)
    assert receiver.ended.wait(5)
    with pytest.raises(Aborted, match="closed"):
        sender.send(*message(1))


def test_send_queues_without_waiting_until_too_much_is_open(receiver):
    receiver.gate.clear()
    sender = receiver.sender(maximum_queued_bytes=10 * 2**20)
    for _ in range(10):
        sender.send(*message(2**20))
    blocked = threading.Thread(target=sender.send, args=message(2**20))
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    with pytest.raises(Unreachable, match="does not take"):
        sender.flush(0.1)
    receiver.gate.set()
    blocked.join(10)
    sender.flush(10)
    assert len(receiver.messages) == 11
    sender.close()


def test_a_payload_may_be_made_on_the_senders_thread(receiver):
    header, data = message(5)
    sender = receiver.sender()
    sender.send(header, lambda: data)
    sender.flush(10)
    assert bytes(receiver.messages[0].payload) == bytes(5)
    failures = []
    broken = receiver.sender(on_failure=failures.append)
    broken.send(header, lambda: memoryview(b"")[3])
    with pytest.raises(InternalError, match="Cannot encode"):
        broken.flush(10)
    assert len(failures) == 1
    sender.close()
    broken.close()


def test_a_refusal_reaches_the_sender_as_the_receivers_typed_error(receiver):
    receiver.limit = 10
    failures = []
    sender = receiver.sender(on_failure=failures.append)
    sender.send(*message(100))
    with pytest.raises(LimitExceeded, match="too large"):
        sender.flush(10)
    with pytest.raises(LimitExceeded):
        sender.send(*message(1))
    wait_until(lambda: failures)
    assert isinstance(failures[0], LimitExceeded)
    sender.close()


def test_a_vanished_peer_is_reported(receiver):
    failures = []
    sender = receiver.sender("stage 1 at nowhere", on_failure=failures.append)
    sender.send(*message(1))
    sender.flush(10)
    receiver.vanish()
    wait_until(lambda: failures)
    with pytest.raises(Unreachable, match="stage 1 at nowhere"):
        sender.send(*message(1))
    assert len(failures) == 1
    sender.close()


def test_cancel_drops_what_is_queued(receiver):
    receiver.gate.clear()
    sender = receiver.sender()
    for _ in range(5):
        sender.send(*message(2**20))
    assert receiver.started.wait(5)
    sender.cancel()
    with pytest.raises(Aborted):
        sender.flush(1)
    sender.close()
    receiver.gate.set()
    assert receiver.ended.wait(5)


def test_every_frame_that_the_network_takes_is_counted(receiver):
    frames = []
    sender = receiver.sender(on_frame=lambda: frames.append(1))
    header, payload = message(3 * 2**20 + 5)
    sender.send(header, payload)
    sender.flush(5)
    assert sender.unreceipted == (0, 0)
    # The last one counts when gRPC comes for more, or when it is written.
    wait_until(lambda: len(frames) == 4)
    assert len(frames) == 4
    receiver.gate.clear()
    header, payload = message(10)
    sender.send(header, payload)
    assert sender.unreceipted == (1, 10)
    receiver.gate.set()
    sender.flush(5)
    sender.close()


def test_what_takes_longer_over_a_network_than_before_is_held_up(receiver):
    sender = receiver.sender()
    sender.send(*message(10))
    sender.flush(5)
    assert not sender.is_held_up
    receiver.gate.clear()
    sender.send(*message(10))
    over_network = "socket" not in receiver.over or receiver.over == "no socket"
    wait_until(lambda: sender.is_held_up, 5 if over_network else 0.3)
    assert sender.is_held_up == over_network
    receiver.gate.set()
    sender.flush(5)
    assert not sender.is_held_up
    # The first of its size tells nothing.
    receiver.gate.clear()
    sender.send(*message(11))
    time.sleep(0.1)
    assert not sender.is_held_up
    receiver.gate.set()
    sender.flush(5)
    sender.close()


def test_only_frames_for_the_network_may_be_made_to_wait(receiver):
    frames = []
    sender = receiver.sender(before_frame=lambda: frames.append(1))
    sender.send(*message(3 * 2**20))
    sender.flush(5)
    assert len(frames) == (3 if receiver.over in ("grpc", "no socket") else 0)
    sender.close()


@pytest.mark.parametrize("receiver", ["socket", "socket, at once"], indirect=True)
def test_over_a_socket_receipts_come_together_and_on_request(receiver):
    delivered = []
    sender = receiver.sender(on_delivered=delivered.append)
    for _ in range(15):
        sender.send(*message(10))
    wait_until(lambda: len(receiver.messages) == 15)
    assert sender.unreceipted == (15 - len(delivered), 10 * (15 - len(delivered)))
    began = time.monotonic()
    sender.flush(10)
    assert time.monotonic() - began < QUIET_SECONDS / 2 or len(delivered) == 15
    # Nobody asks: they come when it has been quiet for a while.
    sender.send(*message(10))
    wait_until(lambda: len(delivered) == 16)
    assert len(delivered) == 16
    sender.send(*message(2**20))
    sender.flush(10)
    assert all(0 < each.seconds < 5 for each in delivered)
    sender.close()


@pytest.mark.parametrize("receiver", ["socket", "no socket"], indirect=True)
def test_a_sender_can_be_cut_off_while_it_connects(receiver):
    connecting, go_on = threading.Event(), threading.Event()

    def connect():
        connecting.set()
        go_on.wait()
        return receiver.connect()

    sender = FrameSender(receiver.channel, "peer", connect=connect)
    sender.send(*message(10))
    assert connecting.wait(5)
    sender.cancel()
    with pytest.raises(Aborted):
        sender.flush(1)
    go_on.set()
    sender.close()
    assert receiver.messages == []


@pytest.mark.parametrize("receiver", ["call"], indirect=True)
def test_a_sender_that_cannot_look_for_a_way_says_so(receiver):
    """On the thread that looks nobody would see it, and all would wait for a message that never comes."""
    failures = []

    def connect():
        raise ValueError("filedescriptor out of range in select()")

    sender = FrameSender(receiver.channel, "stage 1", connect=connect, on_failure=failures.append)
    wait_until(lambda: failures)
    for attempt in (lambda: sender.send(*message(10)), lambda: sender.flush(5)):
        with pytest.raises(InternalError, match=r"Cannot look for a way to stage 1.*out of range"):
            attempt()
    sender.close()
