"""Puts a stage server together from its settings, and takes it apart at the end."""

from __future__ import annotations

import gc
import secrets
from functools import partial
from importlib.metadata import version

import structlog

from gradwire_protocol.channels import open_channel
from gradwire_protocol.handover import default_directory
from gradwire_protocol.roles import Served
from gradwire_protocol.serving import Service, host_name
from gradwire_protocol.v1 import coordinator_pb2
from gradwire_stage.custom_operators import described, load_operators
from gradwire_stage.device import host_memory_bytes, open_device
from gradwire_stage.membership import Membership
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.optimizer import warm_up
from gradwire_stage.service import Limits, StageService
from gradwire_stage.settings import StageSettings
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings
from gradwire_stage.without_compiler import leave_compiler_out

_ROLES = {"stage": coordinator_pb2.SERVER_ROLE_STAGE, "parameter": coordinator_pb2.SERVER_ROLE_PARAMETER}

_log = structlog.get_logger(__name__)


def run_server(settings: StageSettings) -> None:
    """Serve until SIGTERM or SIGINT; then let the run here be ended in good order, and leave the coordinator."""
    leave_compiler_out()
    distribution = version("gradwire")
    device = open_device(settings.device, settings.threads)
    operators = load_operators(settings.operators)
    service = Service("gradwire-stage-server", settings.service())
    service.install_signal_handlers()
    server = settings.server or f"{host_name()}-{secrets.token_hex(4)}"
    info = device.describe()
    dial = partial(open_channel, tls=settings.tls, insecure=settings.insecure)
    metrics = StageMetrics(service.registry, version=distribution, role=settings.role)
    shared_memory = SharedMemory(
        _shared_memory_settings(settings), lambda reason: metrics.shared_fallbacks.labels(reason).inc()
    )
    shared_memory.sweep()
    stage_service = StageService(
        server,
        device,
        Limits(
            memory_bytes=info.memory_bytes,
            mailbox_bytes=settings.mailbox_bytes or info.memory_bytes // 2,
            outbox_bytes=settings.outbox_bytes or info.memory_bytes // 4,
            tensor_bytes=settings.tensor_bytes,
            credit_bytes=settings.credit_bytes,
            send_bytes=settings.send_bytes,
        ),
        metrics,
        dial,
        weights_root=settings.weights_root,
        checkpoint_root=settings.checkpoint_root,
        operators=operators,
        shared_memory=shared_memory,
    )
    stage_service.add_to(service.server)
    service.start()
    channel = dial(settings.coordinator, serves=Served.COORDINATOR)
    membership = Membership(
        channel,
        settings.coordinator,
        coordinator_pb2.RegisterRequest(
            server=server,
            role=_ROLES[settings.role],
            address=service.address,
            metrics_address=service.metrics_address,
            device=info,
            version=distribution,
            operators=described(operators),
        ),
        stage_service.activity,
        on_orphaned=stage_service.holder.release_orphan,
    )
    membership.start()
    service.report_ready()
    warm_up()
    # What the imports have made stays: later collections need not look at it.
    gc.freeze()
    gc.enable()
    service.wait()
    _log.info("stopping", server=server)
    membership.announce_leave(settings.grace_seconds)
    service.finish(lambda: stage_service.holder.current is not None, settings.grace_seconds)
    membership.stop()
    stage_service.release_all("it was asked to stop")
    service.stop()
    channel.close()


def _shared_memory_settings(settings: StageSettings) -> SharedMemorySettings | None:
    if not settings.shared_memory:
        return None
    return SharedMemorySettings(
        directory=settings.shared_memory_directory or default_directory(),
        maximum_bytes=settings.shared_memory_bytes or host_memory_bytes() // 16,
        threshold_bytes=settings.shared_memory_threshold_bytes,
    )
