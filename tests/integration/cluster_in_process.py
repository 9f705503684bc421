"""A whole cluster in the test's own process, for sweeps: the same gRPC, mailbox and executor code, no shortcut.

Models with dropout need real processes: torch's random generator is one a process, and so is a stage server's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from torch._ops import OpOverload

from gradwire.cluster import Cluster, connect
from gradwire_coordinator.log import RunLog
from gradwire_coordinator.metrics import Metrics
from gradwire_coordinator.registry import Registry
from gradwire_coordinator.service import Coordinator
from gradwire_protocol.channels import open_channel
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc
from gradwire_stage.custom_operators import described
from gradwire_stage.device import open_device
from gradwire_stage.membership import Membership
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.service import Limits, StageService


@contextmanager
def cluster_in_process(
    directory: Path,
    stage_servers: int,
    services: list[StageService] | None = None,
    *,
    advertise: Callable[[str], str] = lambda address: address,
    heartbeat_seconds: float = 1.0,
    operators: Mapping[str, OpOverload] = MappingProxyType({}),
) -> Iterator[Cluster]:
    """`services` receives the stage servers' own objects, for tests that look at what they hold.

    advertise: gives the address that others dial for one that a stage server listens on. operators: custom ones that
    the servers have, by target.
    """
    with ExitStack() as stack:
        address = _start_coordinator(stack, directory, heartbeat_seconds)
        for index in range(stage_servers):
            started = _start_stage_server(stack, f"stage-{index}", address, advertise, operators)
            if services is not None:
                services.append(started)
        cluster = stack.enter_context(connect(address))
        while len(cluster.status().servers) < stage_servers:
            pass
        yield cluster


def _start_coordinator(stack: ExitStack, directory: Path, heartbeat_seconds: float) -> str:
    service = Service("coordinator", ServiceSettings(metrics_listen=""))
    coordinator = Coordinator(
        log=stack.enter_context(RunLog(directory)),
        registry=Registry(lease_seconds=10.0, heartbeat_seconds=heartbeat_seconds),
        metrics=Metrics(service.registry, "test"),
        connect=open_channel,
        version="test",
        sweep_seconds=min(1.0, heartbeat_seconds),
    )
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, service.server)
    service.start()
    stack.callback(service.stop)
    stack.callback(coordinator.close)
    return service.address


def _start_stage_server(
    stack: ExitStack,
    name: str,
    coordinator: str,
    advertise: Callable[[str], str],
    operators: Mapping[str, OpOverload],
) -> StageService:
    service = Service(name, ServiceSettings(metrics_listen=""))
    device = open_device("cpu", 1)
    limits = Limits(memory_bytes=2**32, mailbox_bytes=2**30, outbox_bytes=2**30, tensor_bytes=2**30)
    metrics = StageMetrics(service.registry, version="test")
    stage_service = StageService(name, device, limits, metrics, open_channel, operators=operators)
    stage_service.add_to(service.server)
    service.start()
    registration = coordinator_pb2.RegisterRequest(
        server=name,
        role=coordinator_pb2.SERVER_ROLE_STAGE,
        address=advertise(service.address),
        device=device.describe(),
        version="test",
        operators=described(operators),
    )
    channel = open_channel(coordinator)
    membership = Membership(channel, coordinator, registration, stage_service.activity)
    membership.start()
    stack.callback(channel.close)
    stack.callback(service.stop)
    stack.callback(stage_service.release_all, "the test is over")
    stack.callback(membership.stop)
    return stage_service


class Rig:
    """A cluster in this process, its services, and the directory of its coordinator's log."""

    def __init__(self, cluster: Cluster, services: list[StageService], directory: Path) -> None:
        self.cluster, self.services, self.directory = cluster, services, directory
