"""The pages of services that have seen everything there is to count: every metric, with its type, text and labels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_coordinator.metrics import Metrics, RunStanding
from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.certificate_watch import CertificateWatch
from gradwire_protocol.credentials import OwnCertificate
from gradwire_protocol.roles import Role
from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.metrics import StageMetrics


@cache
def pages() -> dict[str, str]:
    """The texts of /metrics, by service: what a run with everything makes of them."""
    registries = {"coordinator": CollectorRegistry(), "stage server": CollectorRegistry()}
    _fill_coordinator(registries["coordinator"])
    _fill_server(registries["stage server"])
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority.create(Path(directory) / "authority")
        files = issue(authority, role=Role.STAGE, name="a", addresses=["localhost"])
        for registry in registries.values():
            CertificateWatch(OwnCertificate(files), registry)
        return {service: generate_latest(registry).decode() for service, registry in registries.items()}


def metric_types(page: str) -> dict[str, str]:
    """The metrics of a page by name, with their types. Not the times of creation that the client library adds."""
    families = text_string_to_metric_families(page)
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in families
        if not family.name.endswith("_created")
    }


def label_names(pages: Iterable[str]) -> dict[str, set[str]]:
    """The labels of every series of some pages, by the name that queries use."""
    found: dict[str, set[str]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _fill_coordinator(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, "1")
    metrics.watch(lambda: [RunStanding("run", 1.0, 1, 2.0, 3.0)])
    timing = run_pb2.Timing(window_seconds=2.0, idle_seconds={"wait-gradient": 1.0})
    result = run_pb2.EntryResult(loss=1.0, seconds=2.5, timings={"server": timing})
    metrics.step_finished("run", 1, {"server": ServerPlace(stages=[0])}, result)


def _fill_server(registry: CollectorRegistry) -> None:
    run = StageMetrics(registry, version="1").of_run("run", (0,), 0, 0)
    run.start()
    run.timing(run_pb2.Timing(window_seconds=1.0), step=True)
    run.sent("peer", pb.DIRECTION_FORWARD, pb.CODEC_INT8, 100, 0.01)
    run.received("peer", pb.DIRECTION_FORWARD, pb.CODEC_INT8, 100, 400)
    run.shared("peer", 100)
    run.loss(1.0)
    run.parameter_bytes(64)
