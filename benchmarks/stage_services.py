"""A stage server inside a benchmark's own process: what its ways of moving tensors run on, without a coordinator."""

from __future__ import annotations

import sys
from functools import partial

from gradwire_protocol.channels import open_channel
from gradwire_protocol.handover import default_directory
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.device import CpuDevice
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.run_state import RunState
from gradwire_stage.service import Limits, StageService
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings


class BenchmarkServer:
    """A stage server that listens. `memory`: whether it offers shared memory to peers."""

    def __init__(self, name: str, settings: ServiceSettings, *, memory: bool) -> None:
        self._service = Service(name, settings)
        self.metrics = StageMetrics(self._service.registry, version="benchmark")
        self._stage_service = StageService(
            name,
            CpuDevice(1),
            Limits(
                memory_bytes=2**34,
                mailbox_bytes=2**32,
                outbox_bytes=2**30,
                tensor_bytes=2**33,
                prepared_seconds=1e6,
            ),
            self.metrics,
            partial(open_channel, tls=settings.tls, insecure=settings.insecure),
            shared_memory=_shared_memory() if memory else None,
        )
        self._stage_service.add_to(self._service.server)
        self._service.start()
        self.address = self._service.address

    def prepare(self, request: stage_pb2.PrepareRequest) -> RunState:
        """Prepare a run; return its state, which is as a compute thread finds it."""
        self._stage_service.Prepare(request, None)
        prepared = self._stage_service.holder.current
        if prepared is None:
            raise RuntimeError(f"run {request.run} has ended before it was used")
        return prepared.run


def _shared_memory() -> SharedMemory:
    def fall_back(reason: str) -> None:
        print(f"a payload, or a peer, goes without shared memory: {reason}", file=sys.stderr)

    return SharedMemory(SharedMemorySettings(directory=default_directory(), maximum_bytes=2**30), fall_back)
