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
    StaleGeneration,
)
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.serving import register_with_raw_streams
from gradwire_protocol.stream_limit import MAXIMUM_STREAMS, StreamLimit
from gradwire_protocol.v1 import run_pb2, stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import Device
from gradwire_stage.executor import Executor
from gradwire_stage.holder import Holder
from gradwire_stage.intake import Intake
from gradwire_stage.kept_state import KeptState
from gradwire_stage.links import MAXIMUM_LINKS, answer, measure_link
from gradwire_stage.local_streams import LocalStreams
from gradwire_stage.mailbox import CREDIT_BYTES
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.peers import SEND_BYTES
from gradwire_stage.profiling import measure_costs
from gradwire_stage.run_state import RunState
from gradwire_stage.shared_memory import SharedMemory

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
    # Of Deliver, at once.
    streams: int = MAXIMUM_STREAMS
    prepared_seconds: float = 60.0


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
        self._streams = StreamLimit(limits.streams, f"Deliver streams to server {server}")
        self._local_streams = LocalStreams(self._shared_memory, self._make_intake, self._streams)
        self.holder = Holder(server, limits.prepared_seconds)
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
        run, kept = self.holder.prepare(
            request.run,
            request.generation,
            lambda fail, kept: self._build(request, fail, kept),
            takes_over=request.takes_over,
        )
        _log.info("prepared", run=run.run, generation=run.generation, stages=run.stages, state_bytes=run.state_bytes)
        return stage_pb2.PrepareReply(
            state_bytes=run.state_bytes, optimizer_state=[] if kept is None else kept.state_names()
        )

    def Execute(  # noqa: N802
        self, requests: Iterator[stage_pb2.ExecuteRequest], context: Any
    ) -> Iterator[stage_pb2.ExecuteReply]:
        executor = self.holder.execute()

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
        self.holder.release(request.run, request.generation, request.reason)
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
        with self.holder.measuring():
            return measure_costs(
                request,
                device=self._device,
                memory_bytes=self._limits.memory_bytes // 2,
                operators=self._operators,
                cancelled=lambda: not context.is_active(),
            )

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
        run = self.holder.find(request.run, request.generation)
        if run is None:
            return stage_pb2.OfferStreamReply(reason="other-run", explanation=_OTHER_RUN)
        return self._local_streams.take_over(request, run.places.everyone_else)

    def OfferSharedBlock(  # noqa: N802
        self, request: stage_pb2.OfferSharedBlockRequest, context: Any
    ) -> stage_pb2.OfferSharedBlockReply:
        run = self.holder.find(request.run, request.generation)
        if run is None:
            return stage_pb2.OfferSharedBlockReply(reason="other-run", explanation=_OTHER_RUN)
        return run.shared.take_over(request)

    def Collect(self, request: stage_pb2.CollectRequest, context: Any) -> Iterator[bytes]:  # noqa: N802
        executor = self.holder.current
        if executor is None:
            raise RunNotFound(f"Run {request.run} is not on this server", got="no run")
        run = executor.run
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

    def activity(self) -> stage_pb2.Activity:
        """Return what this server is doing. Any thread."""
        executor = self.holder.current
        return stage_pb2.Activity() if executor is None else executor.run.activity()

    def release_all(self, reason: str) -> None:
        """End whatever runs here, and wait for it a moment. For the end of the process."""
        self.holder.release_all(reason)
        self._local_streams.close()

    def _make_intake(self) -> Intake:
        return Intake(self._find_run, self._limits.tensor_bytes)

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

    def _find_run(self, key: pb.MessageKey) -> RunState | None:
        """Return the run of a message; None, and counted why, if it is not the one that is here."""
        executor = self.holder.current
        if executor is None or executor.run.run != key.run:
            self._metrics.dropped.labels("other-run").inc()
        elif executor.run.generation != key.generation:
            self._metrics.dropped.labels("other-generation").inc()
        else:
            return executor.run
        return None

    def _mailbox_bytes(self) -> float:
        executor = self.holder.current
        return 0.0 if executor is None else float(executor.run.mailbox.size_bytes)


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
