"""What streams bring is bounded: senders wait, nothing piles up, and every wait ends with the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from stage_cluster import Cluster, wait_until
from stage_model import Reference

from gradwire_protocol.delivery import DELIVER
from gradwire_protocol.errors import Aborted, FrameError, GradwireError, LimitExceeded, from_rpc_error
from gradwire_protocol.frames import CHUNK_BYTES, encode_frames
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import Arrived, CpuDevice
from gradwire_stage.mailbox import OVERHEAD_BYTES
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings

THREE = {"A": [0], "B": [1], "C": [2]}
ROWS = 500
MESSAGE = ROWS * 4 * 8 + OVERHEAD_BYTES  # of h, g and x; y has the same shape


class SlowDevice(CpuDevice):
    """Takes a moment for each tensor that it is given."""

    def claim(self, arrived: Arrived) -> torch.Tensor:
        time.sleep(0.004)
        return super().claim(arrived)


class Bounded(Cluster):
    """A cluster whose servers are told bounds for the value h of stage 0."""

    def request(self, name: str, **identity) -> stage_pb2.PrepareRequest:
        made = super().request(name, **identity)
        made.bounds.add(direction=pb.DIRECTION_FORWARD, source_stage=0, value="h", messages=2, message_bytes=1000)
        return made


def on_this_host(over: str, directory: Path) -> SharedMemory | None:
    """What servers share: nothing where they speak over gRPC."""
    if over == "grpc":
        return None
    return SharedMemory(SharedMemorySettings(directory=directory, maximum_bytes=2**24), lambda reason: None)


class Peak:
    """The largest size of each server's mailbox."""

    def __init__(self, cluster: Cluster) -> None:
        self.size = dict.fromkeys(cluster.servers, 0.0)
        self._cluster = cluster
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            for name, server in self._cluster.servers.items():
                self.size[name] = max(self.size[name], server.metric("gradwire_mailbox_bytes") or 0.0)


@pytest.mark.parametrize(
    ("slow", "over"), [("A", "grpc"), ("B", "grpc"), ("C", "grpc"), ("B", "sockets"), ("C", "sockets")]
)
@pytest.mark.parametrize("kind", ["evaluate", "predict"])
def test_very_many_micro_batches_before_a_slow_stage_stay_bounded(
    kind: str, slow: str, over: str, tmp_path: Path
) -> None:
    """They would take more than the whole mailbox, on each of the streams."""
    parts = 120
    credit, mailbox = 4 * MESSAGE, 40 * MESSAGE
    torch.manual_seed(1)
    x, y = torch.randn(2, parts * ROWS, 4, dtype=torch.float64)
    limits = {"credit_bytes": credit, "mailbox_bytes": mailbox, "send_bytes": credit, "outbox_bytes": mailbox}
    shared = on_this_host(over, tmp_path)
    with Cluster(THREE, devices={slow: SlowDevice(1)}, shared_memory=shared, **limits) as cluster:
        cluster.open()
        with Peak(cluster) as peak:
            entry = cluster.submit_forward(kind, x, y if kind == "evaluate" else None, parts)
            results: list[torch.Tensor] = []
            if kind == "predict":
                found = {key.micro_batch: tensor for key, tensor in cluster.collect(entry, "C")}
                results = [found[index] for index in range(parts)]
            reports = cluster.reports()
        with torch.no_grad():
            expected = Reference()(x)
        if kind == "evaluate":
            assert cluster.loss(reports) == pytest.approx(torch.nn.functional.mse_loss(expected, y).item(), rel=1e-12)
        else:
            torch.testing.assert_close(torch.cat(results), expected, rtol=1e-12, atol=1e-12)
        # Three streams, to the last stage: two from the others and the client's. Each holds its credit, and what the
        # micro-batch in progress needs.
        assert max(peak.size.values()) <= 3 * (credit + 2 * MESSAGE)


@pytest.mark.parametrize("over", ["grpc", "sockets"])
def test_training_with_room_for_next_to_nothing(over: str, tmp_path: Path) -> None:
    """Window and schedule fill every stream; only what is due keeps it from standing still."""
    torch.manual_seed(2)
    x, y = torch.randn(2, 12, 4, dtype=torch.float64)
    limits = {"credit_bytes": 1, "send_bytes": 1}
    shared = on_this_host(over, tmp_path)
    with Cluster(THREE, devices={"B": SlowDevice(1)}, shared_memory=shared, **limits) as cluster:
        cluster.open()
        for _ in range(3):
            cluster.submit_step(x, y, 6, max_gradient_norm=1.0)
        cluster.submit_forward("evaluate", x, y, 12)
        cluster.submit_step(x, y, 6)
        for _ in range(5):
            cluster.reports()
        assert set(cluster.state()) == {"w", "a", "b", "v", "scale"}


def test_a_stream_that_is_held_back_ends_with_the_run() -> None:
    with Cluster(THREE, credit_bytes=2 * MESSAGE) as cluster:
        cluster.open()
        server, rows = cluster.servers["A"], torch.zeros(ROWS, 4, dtype=torch.float64)
        for index in range(20):  # of an entry that never comes
            cluster.send("A", 2, index, "x", rows, pb.DIRECTION_BATCH)
        held = server.stage_service
        wait_until(lambda: held.holder.current.run.mailbox.held_streams == 1)
        assert server.metric("gradwire_mailbox_bytes") <= 2 * MESSAGE
        with pytest.raises(GradwireError):
            cluster.senders["A"].flush(0.2)
        start = time.monotonic()
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1, reason="enough"))
        # The rest comes, and is dropped and counted: what woke up, and the others because there is no run any more.
        cluster.senders["A"].flush(5)
        assert time.monotonic() - start < 5
        woken, others = (
            server.metric("gradwire_messages_dropped_total", reason=reason) or 0 for reason in ("released", "other-run")
        )
        assert woken >= 1
        assert woken + others == 18
        # The next generation takes none of them, and its own.
        server.call("Prepare", cluster.request("A", generation=2))
        cluster.send("A", 2, 0, "x", rows, pb.DIRECTION_BATCH)
        cluster.senders["A"].flush(5)
        assert server.metric("gradwire_messages_dropped_total", reason="other-generation") == 1
        assert server.metric("gradwire_mailbox_bytes") == 0


@pytest.mark.parametrize("over", ["grpc", "sockets"])
def test_a_sender_that_waits_says_for_whom_and_ends_with_the_run(over: str, tmp_path: Path) -> None:
    limits = {"credit_bytes": 1, "send_bytes": 3 * MESSAGE}
    with Cluster(THREE, shared_memory=on_this_host(over, tmp_path), **limits) as cluster:
        cluster.open()
        x = torch.randn(40 * ROWS, 4, dtype=torch.float64)
        entry = cluster.next_entry(evaluate=run_pb2.Evaluate())
        entry.evaluate.micro_batches.extend(cluster.send_batch(entry.number, x, None, 40))
        cluster.streams["A"].submit(entry, " ".join(f"0F{index}" for index in range(40)))  # B and C do not begin it
        server = cluster.servers["A"]
        wait_until(lambda: server.activity().waiting_for == "stage 1 to take what was sent to it")
        wait = server.activity().wait
        assert (wait.kind, wait.server, wait.stage) == (stage_pb2.WAIT_KIND_ROOM, "B", 1)
        assert server.activity().phase == "wait-exchange"
        start = time.monotonic()
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1, reason="enough"))
        assert isinstance(cluster.streams["A"].failure(), Aborted)
        assert time.monotonic() - start < 5
        assert server.activity().run == ""


def header(index: int, tensor: torch.Tensor, *, sequence: int = 1, **key) -> pb.TensorHeader:
    identity = {"run": "r", "generation": 1, "entry": 2, "micro_batch": index, "value": "h", **key}
    identity = {"direction": pb.DIRECTION_FORWARD, **identity}
    made = pb.TensorHeader(key=pb.MessageKey(**identity), sequence=sequence, tensor=tensor_info(tensor))
    made.tensor.requires_grad = True
    return made


def deliver(cluster: Cluster, server: str, frames: Iterator[bytes]):
    call = cluster.servers[server].channel.stream_stream(
        DELIVER, request_serializer=None, response_deserializer=pb.Receipt.FromString
    )
    return call(frames, timeout=10)


def refusal(call) -> GradwireError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return from_rpc_error(caught.value)


def test_a_peer_that_sends_more_than_the_schedule_allows_is_refused() -> None:
    with Bounded(THREE) as cluster:
        cluster.open()
        entry = cluster.next_entry(train_step=run_pb2.TrainStep(step=1))
        for index in range(6):
            entry.train_step.micro_batches.add(index=index, first_row=index, rows=1)
        forward, backward = (" ".join(f"1{kind}{index}" for index in range(6)) for kind in "FB")
        cluster.streams["B"].submit(entry, f"{forward} {backward} REDUCE UPDATE")
        wait_until(lambda: cluster.servers["B"].activity().action == "1F0")
        tensor = torch.zeros(1, 4, dtype=torch.float64)
        order = [1, 2, 3]  # not the one that it waits for
        frames = (
            frame
            for sequence, index in enumerate(order, start=1)
            for frame in encode_frames(header(index, tensor, sequence=sequence), payload_of(tensor))
        )
        error = refusal(deliver(cluster, "B", frames))
        assert isinstance(error, LimitExceeded)
        assert "further ahead than the schedule allows" in str(error)
        assert "forward of micro-batch 3 (value 'h') from stage 0" in str(error)
        # Only that stream has ended.
        assert cluster.servers["B"].activity().run == "r"


def test_a_schedule_that_does_not_fit_is_refused_before_the_run_begins() -> None:
    with Bounded(THREE, mailbox_bytes=1999) as cluster:
        with pytest.raises(LimitExceeded, match="more on its way to this server than its mailbox holds"):
            cluster.servers["B"].call("Prepare", cluster.request("B"))
        request = cluster.request("B")
        request.bounds.add().CopyFrom(request.bounds[0])
        with pytest.raises(FrameError, match="A wrong bound"):
            cluster.servers["B"].call("Prepare", request)


def test_messages_that_no_segment_reads_are_refused() -> None:
    tensor = torch.zeros(1, 4, dtype=torch.float64)
    with Cluster(THREE) as cluster:
        cluster.open()
        for key in ({"value": "nothing"}, {"source_stage": 1}, {"direction": pb.DIRECTION_BATCH, "value": "h"}):
            frames = encode_frames(header(0, tensor, **key), payload_of(tensor))
            assert isinstance(refusal(deliver(cluster, "B", frames)), FrameError)


def test_a_stream_that_breaks_gives_back_its_room_and_its_thread() -> None:
    with Cluster(THREE, credit_bytes=1) as cluster:
        cluster.open()
        server = cluster.servers["B"]
        run = server.stage_service.holder.current.run
        large = torch.zeros(CHUNK_BYTES, dtype=torch.float64)
        gone = threading.Event()

        def begun(*indices: int) -> Iterator[bytes]:
            for sequence, index in enumerate(indices, start=1):
                frames = encode_frames(header(index, large, sequence=sequence), payload_of(large))
                yield from frames if sequence < len(indices) else [next(iter(frames))]
            gone.wait(10)

        # In the middle of a message; and while it is held back.
        for indices, held in (((0,), 0), ((0, 1), 1)):
            call = deliver(cluster, "B", begun(*indices))
            wait_until(lambda: run.mailbox.size_bytes == large.nbytes + OVERHEAD_BYTES)
            wait_until(lambda held=held: run.mailbox.held_streams == held)
            call.cancel()
            wait_until(lambda: run.mailbox.held_streams == 0 and len(run.mailbox._streams) == 1)  # the client's
        gone.set()
        # The first message of the second stream is whole, and stays.
        assert run.mailbox.size_bytes == large.nbytes + OVERHEAD_BYTES


def test_streams_are_limited_for_each_run_and_server() -> None:
    tensor, gone = torch.zeros(1, 4, dtype=torch.float64), threading.Event()

    def stream(index: int) -> Iterator[bytes]:
        yield from encode_frames(header(index, tensor), payload_of(tensor))
        gone.wait(10)

    def opened(cluster: Cluster, count: int) -> list:
        calls = [deliver(cluster, "B", stream(index)) for index in range(count)]
        for call in calls:
            assert next(call).sequence == 1
        return calls

    with Cluster(THREE) as cluster:
        cluster.open()
        calls = opened(cluster, 15)  # beside the client's own: 4 for each of 3 servers, and 4
        error = refusal(deliver(cluster, "B", stream(99)))
        assert isinstance(error, LimitExceeded)
        assert "Too many streams" in str(error)
        calls[0].cancel()
        wait_until(lambda: len(cluster.servers["B"].stage_service.holder.current.run.mailbox._streams) == 15)
        calls += opened(cluster, 1)
    gone.set()
    gone.clear()
    with Cluster(THREE, streams=3) as cluster:
        cluster.open()
        calls = opened(cluster, 2)
        assert "Too many Deliver streams" in str(refusal(deliver(cluster, "B", stream(99))))
        gone.set()


def test_checksums_are_checked_where_the_run_has_them(monkeypatch) -> None:
    class Checked(Cluster):
        checksums = True

    torch.manual_seed(3)
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    with Checked(THREE) as cluster:
        cluster.open()
        cluster.submit_step(x, y, 3)
        cluster.submit_forward("predict", x, None, 3)
        cluster.reports()
        cluster.reports()
        assert len(list(cluster.collect(cluster.entry))) == 3
        tensor = torch.zeros(1, 4, dtype=torch.float64)
        frame = bytearray(next(iter(encode_frames(header(0, tensor, entry=4), payload_of(tensor), checksums=True))))
        frame[-10] ^= 1
        error = refusal(deliver(cluster, "B", iter([bytes(frame)])))
        assert isinstance(error, FrameError)
        assert "offset 0 is not what was sent: forward of micro-batch 0 (value 'h') from stage 0, entry 4" in str(error)
    with Checked(THREE) as cluster:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(GradwireError, match=r"cannot make checksums.*gradwire\[checksums\]"):
            cluster.prepare()
