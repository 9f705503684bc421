"""`gradwire status`: what a coordinator's servers and runs are doing."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gradwire.cli.options import Coordinator, Insecure, TlsAuthority, TlsCertificate, TlsKey
from gradwire.cluster import connect
from gradwire.plain import to_plain
from gradwire_protocol.settings import tls_files
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2


def status(
    coordinator: Coordinator,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
    tls_authority: TlsAuthority = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    insecure: Insecure = False,
) -> None:
    """Show the servers of a cluster, what they do, and the runs."""
    with connect(coordinator, tls_files(tls_authority, tls_certificate, tls_key), insecure=insecure) as cluster:
        reply = cluster.status()
    if json:
        print(dumps(to_plain(reply)))
        return
    console = Console()
    console.print(f"coordinator at {coordinator}, version {reply.version}", highlight=False)
    console.print(_servers(reply))
    console.print(_runs(reply))


def _servers(reply: coordinator_pb2.GetStatusReply) -> Table:
    table = Table(
        "server", "address", "device", "run", "stages", "activity", "heard", title="Servers", title_justify="left"
    )
    for server in reply.servers:
        device = (
            f"{server.device.kind}, {server.device.threads} threads" if server.device.threads else server.device.kind
        )
        stages = ", ".join(map(str, server.activity.stages))
        heard = f"{server.silent_seconds:.1f} s ago"
        table.add_row(
            server.server, server.address, device, server.activity.run, stages, _doing(server.activity), heard
        )
    return table


def _doing(activity: stage_pb2.Activity) -> str:
    if not activity.run:
        return "free"
    parts = [f"entry {activity.entry}", activity.action]
    if activity.waiting_for:
        parts.append(f"waits {activity.waiting_seconds:.1f} s for {activity.waiting_for}")
    return " ".join(part for part in parts if part)


def _runs(reply: coordinator_pb2.GetStatusReply) -> Table:
    table = Table(
        "run", "state", "description", "step", "loss", "entries", "reason", title="Runs", title_justify="left"
    )
    for run in reply.runs:
        state = coordinator_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()
        loss = f"{run.loss:.4f}" if run.HasField("loss") else ""
        entries = f"{run.finished_entry} of {run.last_entry}"
        table.add_row(run.run, state, run.description, str(run.step), loss, entries, run.reason)
    return table
