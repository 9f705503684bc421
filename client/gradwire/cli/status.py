"""`gradwire status`: what a coordinator's servers and runs are doing."""

from __future__ import annotations

import itertools
from json import dumps
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from gradwire.boundaries import boundary_lines
from gradwire.cli.options import Coordinator, Insecure, TlsAuthority, TlsCertificate, TlsKey
from gradwire.cluster import connect
from gradwire.plain import to_plain
from gradwire.run_plan import RunPlan, grid_lines
from gradwire_protocol.activities import stage_lines
from gradwire_protocol.settings import tls_files
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2

_LIVE = (coordinator_pb2.RUN_STATE_PREPARED, coordinator_pb2.RUN_STATE_ACTIVE)


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
    lines_of = stage_lines(_activities(reply), _replicas(reply).get, _shards(reply).get)
    if json:
        print(dumps({**to_plain(reply), "activities": lines_of}))
        return
    console = Console()
    console.print(f"coordinator at {coordinator}, version {reply.version}", highlight=False)
    console.print(_servers(reply))
    console.print(_runs(reply))
    for known in reply.runs:
        if known.state in _LIVE:
            plan = RunPlan.from_proto(known.plan)
            for line in itertools.chain(boundary_lines(plan), grid_lines(plan)):
                console.print(f"{known.run}: {line}", highlight=False, markup=False, soft_wrap=True)
    for run, lines in lines_of.items():
        console.print(f"\n{run}", highlight=False, style="bold")
        for line in lines:
            # Long lines stay lines: others read them, too.
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _activities(reply: coordinator_pb2.GetStatusReply) -> list[tuple[str, stage_pb2.Activity, float]]:
    return [(server.server, server.activity, server.silent_seconds) for server in reply.servers]


def _replicas(reply: coordinator_pb2.GetStatusReply) -> dict[str, int]:
    """Return the replica of each server whose run has several."""
    return {
        server.server: server.replica
        for known in reply.runs
        if known.state in _LIVE and len(known.plan.replica_shares) > 1
        for server in known.plan.prediction.servers
    }


def _shards(reply: coordinator_pb2.GetStatusReply) -> dict[str, int]:
    """Return the shard of each server whose run has several servers a stage."""
    return {
        server.server: server.shard
        for known in reply.runs
        if known.state in _LIVE and known.plan.HasField("tensor")
        for server in known.plan.prediction.servers
    }


def _servers(reply: coordinator_pb2.GetStatusReply) -> Table:
    replicas, shards = _replicas(reply), _shards(reply)
    # Whole where the terminal is narrow, too: names and addresses are to be copied.
    whole = [Column(name, overflow="fold") for name in ("server", "address")]
    table = Table(*whole, "device", "run", "stages", "heard", title="Servers", title_justify="left")
    for server in reply.servers:
        threads = server.device.threads
        device = f"{server.device.kind}, {threads} thread{'s' * (threads != 1)}" if threads else server.device.kind
        stages = ", ".join(map(str, server.activity.stages))
        if server.role == coordinator_pb2.SERVER_ROLE_PARAMETER:
            stages = "parameters"
        else:
            stages += f" (shard {shards[server.server]})" if server.server in shards else ""
            stages += f" of replica {replicas[server.server]}" if server.server in replicas else ""
        heard = f"{server.silent_seconds:.1f} s ago"
        run = server.activity.run or "free"
        run += ", leaving" if server.leaving else ""
        table.add_row(server.server, server.address, device, run, stages, heard)
    return table


def _runs(reply: coordinator_pb2.GetStatusReply) -> Table:
    table = Table(
        *("run", "state", "description", "step", "loss", "entries", "checkpoint", "reason"),
        title="Runs",
        title_justify="left",
    )
    for run in reply.runs:
        state = coordinator_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()
        loss = f"{run.loss:.4f}" if run.HasField("loss") else ""
        entries = f"{run.finished_entry} of {run.last_entry}"
        checkpoint = run.checkpoint.directory
        table.add_row(run.run, state, run.description, str(run.step), loss, entries, checkpoint, run.reason)
    return table
