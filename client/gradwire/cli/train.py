"""`gradwire train`: the main job, on a cluster of its own or on a running one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwire.cli.flags import with_flags
from gradwire.cli.reporters import BarReporter, JsonReporter, LineReporter
from gradwire.cluster import Cluster, connect
from gradwire.collector import collector_paused
from gradwire.job.files import text_files
from gradwire.job.reporter import Reporter
from gradwire.job.run_directory import RunDirectory
from gradwire.job.settings import JobSettings, load_job_settings, parameter_servers_of, reference_values, servers_of
from gradwire.local_cluster import LocalProcesses
from gradwire_protocol.errors import PlanError, SettingsError
from gradwire_protocol.settings import tls_files
from gradwire_protocol.v1 import coordinator_pb2


@with_flags(JobSettings, reference_values())
def train(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings, such as examples/reference.toml")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Directory of a run with checkpoints (--save-every), to go on from the newest of them"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a step, and a last one")] = False,
    **flags: Any,
) -> None:
    """Train a byte-level GPT on text, and check that the result equals one process.

    With --save-every it leaves checkpoints, and --resume goes on from the newest as if it had not been interrupted: the
    run's own settings are the defaults then.

    Settings: flags come before environment variables (GRADWIRE_STEPS=100), these before --config, and that before the
    reference job. Without --coordinator, a local cluster is started, and ended with the command.
    """
    started_at = time.monotonic()
    resumed = _resumed(resume, config, flags)
    settings = load_job_settings(flags, resumed.settings if resumed is not None else config)
    text_files(settings.data)
    tls = tls_files(settings.tls_authority, settings.tls_certificate, settings.tls_key)
    reporter = _reporter(json, settings.steps)
    if settings.coordinator is not None:
        with connect(settings.coordinator, tls, insecure=settings.insecure) as cluster:
            _check_servers(cluster, servers_of(settings))
            directory = resumed or RunDirectory.create(settings.out)
            summary = _run(settings, cluster, None, directory, reporter, started_at, resume=resume is not None)
    else:
        directory = resumed or RunDirectory.create(settings.out)
        reporter.note(f"starting a coordinator and {servers_of(settings)} stage servers …")
        # The servers start, and import torch, while this process does.
        with (
            LocalProcesses(
                stage_servers=servers_of(settings),
                parameter_servers=parameter_servers_of(settings),
                threads=settings.threads,
                log_dir=directory.logs,
            ) as processes,
            Cluster(processes.address) as cluster,
        ):
            summary = _run(settings, cluster, processes, directory, reporter, started_at, resume=resume is not None)
    if summary["verdict"] == "different":
        raise typer.Exit(1)


def _run(
    settings: JobSettings,
    cluster: Cluster,
    processes: LocalProcesses | None,
    directory: RunDirectory,
    reporter: Reporter,
    started_at: float,
    *,
    resume: bool,
) -> dict[str, Any]:
    # Imports torch: late, when the servers are on their way.
    with collector_paused():
        import torch

        from gradwire.job.training import Job

    # The cores are the servers'. A second thread here would do nothing but spin between small operations.
    torch.set_num_threads(1)
    job = Job(settings)
    if processes is not None:
        processes.wait_registered(cluster)
    with reporter:
        return job.run(cluster, directory, reporter, started_at, resume=resume)


def _resumed(resume: Path | None, config: Path | None, flags: dict[str, Any]) -> RunDirectory | None:
    """Return the directory of the run that shall go on, which has the settings, too; None for a new run."""
    if resume is None:
        return None
    for flag, value in (("--config", config), ("--out", flags.get("out"))):
        if value is not None:
            raise SettingsError(
                f"{flag} and --resume exclude each other",
                expected="the settings and the directory of the run that goes on",
                got=f"{flag} {value}",
                remedy=f"leave {flag} out; other flags change single settings",
            )
    directory = RunDirectory.reopen(resume)
    if not directory.checkpoints.is_dir():
        raise SettingsError(
            f"There are no checkpoints in {resume}",
            expected="a run that was started with --save-every",
            remedy="train anew, with --save-every",
        )
    return directory


def _check_servers(cluster: Cluster, needed: int) -> None:
    """Tell at once, before anything is loaded, that there are too few servers."""
    servers = sum(each.role == coordinator_pb2.SERVER_ROLE_STAGE for each in cluster.status().servers)
    if servers < needed:
        raise PlanError(
            "There are fewer stage servers than the plan takes",
            expected=f"{needed} stage servers at {cluster.address}",
            got=str(servers),
            remedy="start more stage servers, or give fewer --stages, --replicas or --tensor",
        )


def _reporter(json: bool, steps: int) -> Reporter:
    if json:
        return JsonReporter()
    return BarReporter(steps) if sys.stdout.isatty() and sys.stderr.isatty() else LineReporter()
