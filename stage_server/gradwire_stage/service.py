"""StageService: what coordinator, clients and peers call. Holds at most one run, and computes nothing itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import structlog

from gradwire_protocol.channels import OpenChannel
from gradwire_protocol.errors import (
    Aborted,
    GradwireError,
    LimitExceeded,
    RunNotFound,
    ServerBusy,
    StaleGeneration,
)
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.serving import register_with_raw_streams
from gradwire_protocol.v1 import run_pb2, stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import Device
from gradwire_stage.ended_runs import EndedRuns
from gradwire_stage.executor import Executor
from gradwire_stage.intake import Intake, StreamLimit
from gradwire_stage.kept_state import KeptState
from gradwire_stage.links import MAXIMUM_LINKS, answer, measure_link
from gradwire_stage.local_streams import LocalStreams
from gradwire_stage.mailbox import CREDIT_BYTES
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.peers import SEND_BYTES
from gradwire_stage.profiling import measure_costs
from gradwire_stage.run_state import RunState
from gradwire_stage.shared_memory import SharedMemory

# A run that is released ends within this time, unless a single operator takes longer.
_RELEASE_SECONDS = 1.0
_TAKE_OVER_SECONDS = 5.0
_OTHER_RUN = "another run, or generation of it, is prepared here, or none"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use here, in bytes; and how long it may be prepared without an Execute stream, in seconds.

    mailbox_bytes: messages that wait, of all streams; credit_bytes: of one stream, before it is held back; send_bytes:
    messages on a stream to a peer that it has not receipted.
    """

    memory_bytes: int
    mailbox_bytes: int
    outbox_bytes: int
    tensor_bytes: int
    credit_bytes: int = CREDIT_BYTES
    send_bytes: int = SEND_BYTES
    # Deliver streams at once; each holds a thread of the server's pool.
    streams: int = 448
    prepared_seconds: float = 60.0


class _Held:
    """The run that holds the server, and whether its Execute stream is open."""

    def __init__(self, executor: Executor, prepared_seconds: float) -> None:
        self.executor = executor
        self.executing = False
        # A coordinator may vanish before it opens its Execute stream.
        self.expiry = threading.Timer(prepared_seconds, self._expire)
        self.expiry.daemon = True
        self.expiry.start()

    def _expire(self) -> None:
        if not self.executing:
            self.executor.release(Aborted("The coordinator opened no Execute stream in time"))


class StageService(stage_pb2_grpc.StageServiceServicer):
    """The servicer. `server` is this server's identifier; `open_channel` dials a peer's address; `bulk`: for what may
    wait.

    weights_root: the directory that runs may have this server read weights from; None: none. checkpoint_root: the one
    that it writes checkpoints to, and reads them from. operators: those that are admitted besides the allow-list, by
    target. shared_memory: for payloads to and from servers of this host; None: none.
    """

    def __init__(
        self,
        server: str,
        device: Device,
        limits: Limits,
        metrics: StageMetrics,
        open_channel: OpenChannel,
        *,
        weights_root: Path | None = None,
        checkpoint_root: Path | None = None,
        operators: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        shared_memory: SharedMemory | None = None,
    ) -> None:
        self._server = server
        self._device = device
        self._limits = limits
        self._metrics = metrics
        self._open_channel = open_channel
        self._weights_root = weights_root
        self._checkpoint_root = checkpoint_root
        self._operators = operators
        self._shared_memory = shared_memory or SharedMemory.off()
        self._streams = StreamLimit(limits.streams)
        self._local_streams = LocalStreams(self._shared_memory, self._make_intake, self._streams)
        self._lock = threading.Lock()  # guards _held
        self._preparing = threading.Lock()  # one Prepare at a time, and no measurement beside it
        self._held: _Held | None = None
        self._ended = EndedRuns(server)
        metrics.mailbox_bytes.set_function(self._mailbox_bytes)
        metrics.local_streams.set_function(lambda: self._local_streams.count)
        metrics.shared_memory_bytes.set_function(lambda: self._shared_memory.size_bytes)

    def add_to(self, server: Any) -> None:
        """Register with a grpc.Server; Deliver gets frames as bytes, Collect gives them."""
        register_with_raw_streams(
            stage_pb2_grpc.add_StageServiceServicer_to_server,
            self,
            server,
            raw_requests=("Deliver",),
            raw_responses=("Collect",),
        )

    # --- the coordinator's calls

    def Prepare(self, request: stage_pb2.PrepareRequest, context: Any) -> stage_pb2.PrepareReply:  # noqa: N802
        with self._preparing:
            self._ended.check(request.run, request.generation)
            kept = self._kept_for(request) if request.takes_over else None
            self._make_room(request.run, request.generation)
            executor = Executor(lambda fail: self._build(request, fail, kept), self._on_end)
            with self._lock:
                self._held = _Held(executor, self._limits.prepared_seconds)
            try:
                # Released while it was prepared: its coordinator does not wait for it any more.
                self._ended.check(request.run, request.generation)
            except StaleGeneration as error:
                executor.release(error)
                raise
        run = executor.run
        _log.info("prepared", run=run.run, generation=run.generation, stages=run.stages, state_bytes=run.state_bytes)
        return stage_pb2.PrepareReply(
            state_bytes=run.state_bytes, optimizer_state=[] if kept is None else kept.state_names()
        )

    def Execute(  # noqa: N802
        self, requests: Iterator[stage_pb2.ExecuteRequest], context: Any
    ) -> Iterator[stage_pb2.ExecuteReply]:
        with self._lock:
            held = self._held
            if held is None:
                raise RunNotFound("No run is prepared on this server", remedy="prepare it first")
            if held.executing:
                raise ServerBusy(f"Run {held.executor.run.run} has an Execute stream already")
            held.executing = True
            held.expiry.cancel()
        executor = held.executor

        def gone() -> None:
            # Nothing to do where the run has ended; otherwise the stream has broken. Its entries may just end then, as
            # if no more were to come, while the one that is open waits for messages that nobody sends.
            executor.release(Aborted("The coordinator's stream has ended"))

        if not context.add_callback(gone):
            gone()
        reader = threading.Thread(target=_read_entries, args=(executor, requests), name="entries", daemon=True)
        reader.start()
        try:
            for report in executor.reports():
                if isinstance(report, run_pb2.SavedPart):
                    yield stage_pb2.ExecuteReply(saved=report)
                else:
                    yield stage_pb2.ExecuteReply(report=report)
        finally:
            gone()

    def Release(self, request: stage_pb2.ReleaseRequest, context: Any) -> stage_pb2.ReleaseReply:  # noqa: N802
        # First: a Prepare that is on its way sees it afterwards.
        self._ended.note(request.run, request.generation)
        held = self._held
        if held is not None and held.executor.run.run == request.run:
            run = held.executor.run
            if run.generation <= request.generation:
                _log.info("released", run=run.run, generation=run.generation, reason=request.reason)
                held.executor.release(Aborted(f"Run {run.run} was released", got=request.reason))
                held.executor.wait_ended(_RELEASE_SECONDS)
        return stage_pb2.ReleaseReply()

    def GetActivity(self, request: stage_pb2.GetActivityRequest, context: Any) -> stage_pb2.GetActivityReply:  # noqa: N802
        return stage_pb2.GetActivityReply(activity=self.activity())

    # --- links

    def MeasureLinks(  # noqa: N802
        self, request: stage_pb2.MeasureLinksRequest, context: Any
    ) -> stage_pb2.MeasureLinksReply:
        if len(request.addresses) > MAXIMUM_LINKS:
            raise LimitExceeded("Too many links", expected=f"{MAXIMUM_LINKS} at most", got=str(len(request.addresses)))
        links = []
        for address in request.addresses:
            with closing(self._open_channel(address)) as channel:
                links.append(measure_link(channel, address))
        return stage_pb2.MeasureLinksReply(links=links)

    def Probe(self, request: stage_pb2.ProbeRequest, context: Any) -> stage_pb2.ProbeReply:  # noqa: N802
        return answer(request)

    # --- costs

    def MeasureCosts(  # noqa: N802
        self, request: stage_pb2.MeasureCostsRequest, context: Any
    ) -> stage_pb2.MeasureCostsReply:
        if not self._preparing.acquire(blocking=False):
            raise ServerBusy(f"Stage server {self._server} prepares a run, or measures costs", expected="a free server")
        try:
            self._make_room("", 0)
            return measure_costs(
                request,
                device=self._device,
                memory_bytes=self._limits.memory_bytes // 2,
                operators=self._operators,
                cancelled=lambda: not context.is_active(),
            )
        finally:
            self._preparing.release()

    # --- tensors

    def Deliver(self, requests: Iterator[bytes], context: Any) -> Iterator[pb.Receipt]:  # noqa: N802
        intake = self._make_intake()
        with self._streams, closing(intake):
            # The stream may end while its thread waits for room.
            if not context.add_callback(intake.interrupt):
                return
            for frame in requests:
                whole = intake.feed(frame)
                # Not kept alive while the next one is waited for.
                del frame
                if whole is not None:
                    yield pb.Receipt(sequence=whole.sequence)
            intake.finish()

    def OfferStream(  # noqa: N802
        self, request: stage_pb2.OfferStreamRequest, context: Any
    ) -> stage_pb2.OfferStreamReply:
        run = self._run_of(request)
        if run is None:
            return stage_pb2.OfferStreamReply(reason="other-run", explanation=_OTHER_RUN)
        return self._local_streams.take_over(request, run.places.everyone_else)

    def OfferSharedBlock(  # noqa: N802
        self, request: stage_pb2.OfferSharedBlockRequest, context: Any
    ) -> stage_pb2.OfferSharedBlockReply:
        run = self._run_of(request)
        if run is None:
            return stage_pb2.OfferSharedBlockReply(reason="other-run", explanation=_OTHER_RUN)
        return run.shared.take_over(request)

    def Collect(self, request: stage_pb2.CollectRequest, context: Any) -> Iterator[bytes]:  # noqa: N802
        held = self._held
        if held is None:
            raise RunNotFound(f"Run {request.run} is not on this server", got="no run")
        run = held.executor.run
        if run.run != request.run or run.generation != request.generation:
            raise StaleGeneration(
                "Another run or generation is prepared here",
                expected=f"run {run.run}, generation {run.generation}",
                got=f"run {request.run}, generation {request.generation}",
            )
        for sequence, result in enumerate(run.outbox.collect(request.entry), start=1):
            result.header.sequence = sequence
            payload = result.payload() if callable(result.payload) else result.payload
            for frame in encode_frames(result.header, payload, checksums=run.checksums):
                yield frame
                run.progress.advance_client()
            run.metrics.collected(result.header.tensor.size_bytes)
            del result, payload, frame

    # --- for the process around it

    @property
    def is_held(self) -> bool:
        """Whether a run is here."""
        return self._held is not None

    def activity(self) -> stage_pb2.Activity:
        """Return what this server is doing. Any thread."""
        held = self._held
        return stage_pb2.Activity() if held is None else held.executor.run.activity()

    def release_orphan(self, reason: str) -> None:
        """End the run that is here, if there is one, whose coordinator does not answer. Any thread; does not wait."""
        held = self._held
        if held is not None:
            held.executor.release(Aborted("The run has lost its coordinator", got=reason))

    def release_all(self, reason: str) -> None:
        """End whatever runs here, and wait for it a moment. For the end of the process."""
        held = self._held
        if held is not None:
            held.executor.release(Aborted(f"Stage server {self._server} ends", got=reason))
            held.executor.wait_ended(_TAKE_OVER_SECONDS)
        self._local_streams.close()

    def _run_of(self, request: stage_pb2.OfferStreamRequest | stage_pb2.OfferSharedBlockRequest) -> RunState | None:
        held = self._held
        if held is None or (held.executor.run.run, held.executor.run.generation) != (request.run, request.generation):
            return None
        return held.executor.run

    def _make_intake(self) -> Intake:
        return Intake(self._find_run, self._limits.tensor_bytes)

    def _kept_for(self, request: stage_pb2.PrepareRequest) -> KeptState:
        """Return the state of the generation before."""
        held = self._held
        if held is None or held.executor.run.run != request.run or not held.executor.between_entries:
            raise StaleGeneration(
                "The run's generation before cannot be taken over",
                expected=f"run {request.run} on server {self._server}, between two entries",
                got="no run" if held is None else f"run {held.executor.run.run}, {held.executor.run.progress.where()}",
            )
        return KeptState.of(held.executor.run)

    def _build(
        self, request: stage_pb2.PrepareRequest, fail: Callable[[GradwireError], None], kept: KeptState | None
    ) -> RunState:
        return RunState(
            request,
            server=self._server,
            device=self._device,
            memory_bytes=self._limits.memory_bytes,
            mailbox_bytes=self._limits.mailbox_bytes,
            outbox_bytes=self._limits.outbox_bytes,
            credit_bytes=self._limits.credit_bytes,
            send_bytes=self._limits.send_bytes,
            open_channel=self._open_channel,
            metrics=self._metrics,
            fail=fail,
            weights_root=self._weights_root,
            checkpoint_root=self._checkpoint_root,
            operators=self._operators,
            shared_memory=self._shared_memory,
            tensor_bytes=self._limits.tensor_bytes,
            bell=self._local_streams.bell,
            kept=kept,
        )

    def _make_room(self, run: str, generation: int) -> None:
        """Raise ServerBusy unless the server is free, or held by a run that ends or is replaced by this one."""
        held = self._held
        if held is None:
            return
        old = held.executor.run
        if old.run == run and old.generation < generation:
            held.executor.release(Aborted(f"Run {run} goes on as generation {generation}"))
        if held.executor.ending and held.executor.wait_ended(_TAKE_OVER_SECONDS):
            return
        raise ServerBusy(
            f"Stage server {self._server} is held by another run",
            expected="a free server",
            got=f"run {old.run}, generation {old.generation}",
            remedy="end that run, or start more stage servers",
        )

    def _on_end(self, executor: Executor) -> None:
        self._ended.note(executor.run.run, executor.run.generation)
        with self._lock:
            if self._held is not None and self._held.executor is executor:
                self._held.expiry.cancel()
                self._held = None
        _log.info("the run has ended here", run=executor.run.run, generation=executor.run.generation)

    def _find_run(self, key: pb.MessageKey) -> RunState | None:
        """Return the run of a message; None, and counted why, if it is not the one that is here."""
        held = self._held
        if held is None or held.executor.run.run != key.run:
            self._metrics.dropped.labels("other-run").inc()
        elif held.executor.run.generation != key.generation:
            self._metrics.dropped.labels("other-generation").inc()
        else:
            return held.executor.run
        return None

    def _mailbox_bytes(self) -> float:
        held = self._held
        return 0.0 if held is None else float(held.executor.run.mailbox.size_bytes)


def _read_entries(executor: Executor, requests: Iterator[stage_pb2.ExecuteRequest]) -> None:
    """Submit what comes on the coordinator's stream; end the run with the stream."""
    try:
        for request in requests:
            executor.submit(request)
    except grpc.RpcError:
        executor.release(Aborted("The coordinator's stream broke", got="the coordinator cancelled it, or is gone"))
    except GradwireError as error:
        executor.fail(error)
    else:
        executor.close()
