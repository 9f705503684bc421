"""What moves the sums of a run: those of tensor-parallel servers, and those of replicas; with the reason.

Pure. Leaves to others: who adds up with whom (`tensor_groups.py`, `replica_groups.py`), and what replicas do about
torch's ways of adding up (`sharing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gradwire_coordinator.sharing import Sharing
from gradwire_coordinator.tensor_groups import Unit, host_of
from gradwire_protocol.errors import PlanError
from gradwire_protocol.transports import AUTO, DEVICE_OF_TORCHS, GRPC
from gradwire_protocol.v1 import run_pb2


class Transport(NamedTuple):
    """A transport, and why it was chosen; both empty where there is nothing to add up."""

    name: str
    reason: str


def choose_transport(plan: run_pb2.Plan, sharing: Sharing, replicas: Sequence[Sequence[Unit]]) -> Transport:
    """Return what moves the sums of these servers, by replica, position and shard.

    PlanError for what is not for the devices. Left open it is what needs no ports, and no trust in the network, beside
    the servers' own.
    """
    if plan.tensor * plan.replicas == 1:
        return Transport("", "")
    asked = plan.transport or AUTO
    if asked in DEVICE_OF_TORCHS:
        _check_devices(asked, replicas)
        if plan.replicas > 1 and not sharing.sums_by:
            encoded = f"{sharing.codec} encodes what replicas exchange, which goes as messages"
            if plan.tensor == 1:
                return Transport(GRPC, encoded)
            return Transport(asked, f"the plan asks for it; {encoded}")
    if asked != AUTO:
        return Transport(asked, "the plan asks for it")
    if all(len(hosts) == 1 for hosts in _hosts(replicas)):
        return Transport(GRPC, "the servers that add up share a host, where payloads pass through shared memory")
    return Transport(GRPC, "it goes between hosts, and within one passes payloads through shared memory")


def _check_devices(asked: str, replicas: Sequence[Sequence[Unit]]) -> None:
    wanted = DEVICE_OF_TORCHS[asked]
    others = [server for units in replicas for unit in units for server in unit if server.device.kind != wanted]
    if others:
        raise PlanError(
            f"transport={asked!r} is for servers on {wanted} devices",
            expected=f"{wanted} devices only",
            got=f"server {others[0].server} on {others[0].device.kind}",
            remedy=f'set transport="{AUTO}", or take other servers',
        )


def _hosts(replicas: Sequence[Sequence[Unit]]) -> list[set[str]]:
    """Return the hosts of each group of servers that add up together: shards of a stage, replicas of a shard."""
    shards = [{host_of(server) for server in unit} for units in replicas for unit in units]
    return shards + [
        {host_of(server) for server in servers}
        for units in zip(*replicas, strict=True)
        for servers in zip(*units, strict=True)
    ]
