"""The client's end of the log, against a real gRPC server that answers as each test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from gradwire.drive import Drive
from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import Aborted, ErrorInterceptor, GradwireError, InternalError, StageFailed, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc, run_pb2

# Stands for a sign of life among the results.
SIGN = 0
Answer = Callable[[Iterator[coordinator_pb2.DriveRequest]], Iterator[int]]


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.ended: list[str] = []

    def Drive(self, requests: Iterator[coordinator_pb2.DriveRequest], context: Any) -> Iterator[Any]:
        for number in self.answer(requests):
            if number == SIGN:
                yield coordinator_pb2.DriveReply()
            else:
                yield coordinator_pb2.DriveReply(result=run_pb2.EntryResult(entry=number, loss=float(number)))

    def EndRun(self, request: coordinator_pb2.EndRunRequest, context: Any) -> coordinator_pb2.EndRunReply:
        self.ended.append(request.run)
        return coordinator_pb2.EndRunReply()


Start = Callable[..., Drive]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server that answers the stream with the results of these entries, and drive it."""
    ends: list[Callable[[], Any]] = []

    def start_one(answer: Answer, window: int = 2, **options: Any) -> Drive:
        server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
        servicer = options.pop("servicer", None) or Coordinator(answer)
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel = open_channel(f"127.0.0.1:{port}")
        drive = Drive(channel, "run", 3, window, "the coordinator", **options)
        ends.extend((lambda: drive.close(1.0), channel.close, lambda: server.stop(0).wait()))
        return drive

    yield start_one
    for end in ends:
        end()


def submit(drive: Drive) -> futures.Future[run_pb2.EntryResult]:
    return drive.submit(run_pb2.Entry(number=drive.reserve()))


def test_entries_are_numbered_and_get_their_results(start: Start) -> None:
    seen: list[coordinator_pb2.DriveRequest] = []

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        for request in requests:
            seen.append(request)
            yield request.entry.number

    drive = start(answer)
    assert [submit(drive).result(5).loss for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert [request.entry.number for request in seen] == [1, 2, 3, 4]
    assert {(request.run, request.entry.generation) for request in seen} == {("run", 3)}


def test_no_more_than_the_window_is_open(start: Start) -> None:
    go = threading.Semaphore(0)

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        for request in requests:
            go.acquire()
            yield request.entry.number

    drive = start(answer, window=2)
    first, _ = submit(drive), submit(drive)
    reserved = threading.Thread(target=drive.reserve)
    reserved.start()
    reserved.join(0.3)
    assert reserved.is_alive()
    go.release()
    reserved.join(5)
    assert not reserved.is_alive()
    assert first.done()
    go.release(2)


def test_a_generation_begins_when_all_is_finished(start: Start) -> None:
    go = threading.Event()
    seen: list[int] = []

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        for request in requests:
            go.wait(5)
            seen.append(request.entry.generation)
            yield request.entry.number

    drive = start(answer)
    first = submit(drive)
    threading.Timer(0.1, go.set).start()
    drive.wait_idle()
    assert first.done()
    drive.begin_generation(4)
    submit(drive).result(5)
    assert seen == [3, 4]


def test_a_failure_reaches_every_waiter_and_every_later_call(start: Start) -> None:
    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        next(requests), next(requests)
        raise StageFailed("Stage 1 was lost", expected="a server", got="none", remedy="start it again")
        yield 0

    drive = start(answer)
    waiting = [submit(drive), submit(drive)]
    errors: list[BaseException | None] = [future.exception(5) for future in waiting]
    with pytest.raises(StageFailed) as caught:
        drive.reserve()
    assert errors == [caught.value, caught.value]
    assert caught.value.remedy == "start it again"
    assert drive.wait_failure(0.0) is caught.value


def test_a_reserver_that_waits_is_woken_by_a_failure(start: Start) -> None:
    go = threading.Event()

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        next(requests)
        go.wait(5)
        raise StageFailed("Stage 0 was lost")
        yield 0

    drive = start(answer, window=1)
    submit(drive)
    threading.Timer(0.2, go.set).start()
    with pytest.raises(StageFailed):
        drive.reserve()


def expect(drive: Drive, kind: type[GradwireError]) -> None:
    assert isinstance(submit(drive).exception(5), kind)


def test_a_stream_that_ends_early_is_an_error(start: Start) -> None:
    expect(start(lambda requests: (next(requests), iter(()))[1]), Aborted)


def test_a_result_out_of_order_is_an_error(start: Start) -> None:
    expect(start(lambda requests: (request.entry.number + 1 for request in requests)), InternalError)


def test_nobody_there_is_unreachable() -> None:
    channel = open_channel("127.0.0.1:9")
    drive = Drive(channel, "run", 1, 1, "the coordinator at 127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        raise drive.wait_failure(5.0) or AssertionError
    drive.close(1.0)
    channel.close()


def test_closing_waits_for_the_coordinator_and_ends_what_is_open(start: Start) -> None:
    ended = threading.Event()

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        for _ in requests:
            pass
        ended.set()
        return iter(())

    drive = start(answer)
    future = submit(drive)
    drive.close(5.0)
    assert ended.is_set()
    assert isinstance(future.exception(0), Aborted)
    drive.close(5.0)


def test_closing_does_not_wait_for_ever(start: Start) -> None:
    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        time.sleep(2.0)
        return iter(())

    drive = start(answer)
    began = time.monotonic()
    drive.close(0.2)
    assert time.monotonic() - began < 1.5


def test_a_coordinator_that_gives_no_sign_of_life_is_unreachable(start: Start) -> None:
    go = threading.Event()

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        go.wait(20)
        return iter(())

    failed = threading.Event()
    drive = start(answer, silence_seconds=2.0, on_failure=failed.set)
    future = submit(drive)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="The coordinator has not been heard of for") as caught:
        future.result(10)
    go.set()
    assert 1.0 < time.monotonic() - began < 6.0
    assert caught.value.got == "none while 1 entries were open"
    assert failed.wait(1)


def test_signs_of_life_are_no_results_and_keep_a_long_wait_alive(start: Start) -> None:
    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        number = next(requests).entry.number
        for _ in range(8):
            yield SIGN
            time.sleep(0.5)
        yield number

    drive = start(answer, silence_seconds=2.0)
    assert submit(drive).result(10).loss == 1.0
    assert drive.finished_number == 1


def test_an_abort_ends_the_run_at_the_coordinator_and_every_wait_at_once(start: Start) -> None:
    go = threading.Event()

    def answer(requests: Iterator[coordinator_pb2.DriveRequest]) -> Iterator[int]:
        go.wait(20)
        return iter(())

    servicer = Coordinator(answer)
    drive = start(answer, servicer=servicer)
    future = submit(drive)
    began = time.monotonic()
    drive.abort(5.0)
    assert time.monotonic() - began < 2.0
    go.set()
    assert servicer.ended == ["run"]
    assert isinstance(future.exception(0), Aborted)
    drive.abort(5.0)
