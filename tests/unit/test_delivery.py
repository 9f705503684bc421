"""Senders against a real receiver: order, receipts, back-pressure, failures."""

import threading
import time
from concurrent import futures

import grpc
import pytest

from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.errors import Aborted, ErrorInterceptor, InternalError, LimitExceeded, Unreachable
from gradwire_protocol.frames import FrameAssembler
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

    def Deliver(self, requests, context):
        self.started.set()
        assembler = FrameAssembler(self.limit)
        try:
            for frame in requests:
                self.gate.wait()
                if message := assembler.feed(frame):
                    self.messages.append(message)
                    yield pb.Receipt(sequence=message.header.sequence)
        finally:
            self.ended.set()


@pytest.fixture
def receiver():
    servicer = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
    register_with_raw_streams(
        stage_pb2_grpc.add_StageServiceServicer_to_server, servicer, server, raw_requests=["Deliver"]
    )
    address = bind(server, "127.0.0.1:0")
    server.start()
    servicer.server = server
    servicer.channel = open_channel(address)
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
    sender = FrameSender(receiver.channel, "peer", on_delivered=delivered.append)
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
    sender = FrameSender(receiver.channel, "peer", maximum_queued_bytes=10 * 2**20)
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
    sender = FrameSender(receiver.channel, "peer")
    sender.send(header, lambda: data)
    sender.flush(10)
    assert bytes(receiver.messages[0].payload) == bytes(5)
    failures = []
    broken = FrameSender(receiver.channel, "peer", on_failure=failures.append)
    broken.send(header, lambda: memoryview(b"")[3])
    with pytest.raises(InternalError, match="Cannot encode"):
        broken.flush(10)
    assert len(failures) == 1
    sender.close()
    broken.close()


def test_a_refusal_reaches_the_sender_as_the_receivers_typed_error(receiver):
    receiver.limit = 10
    failures = []
    sender = FrameSender(receiver.channel, "peer", on_failure=failures.append)
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
    sender = FrameSender(receiver.channel, "stage 1 at nowhere", on_failure=failures.append)
    sender.send(*message(1))
    sender.flush(10)
    receiver.server.stop(None).wait()
    wait_until(lambda: failures)
    with pytest.raises(Unreachable, match="stage 1 at nowhere"):
        sender.send(*message(1))
    assert len(failures) == 1
    sender.close()


def test_cancel_drops_what_is_queued(receiver):
    receiver.gate.clear()
    sender = FrameSender(receiver.channel, "peer")
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
    sender = FrameSender(receiver.channel, "peer", on_frame=lambda: frames.append(1))
    header, payload = message(3 * 2**20 + 5)
    sender.send(header, payload)
    sender.flush(5)
    assert sender.unreceipted == (0, 0)
    # The last one counts when gRPC comes for more.
    wait_until(lambda: len(frames) == 4)
    assert len(frames) == 4
    receiver.gate.clear()
    header, payload = message(10)
    sender.send(header, payload)
    assert sender.unreceipted == (1, 10)
    receiver.gate.set()
    sender.flush(5)
    sender.close()
