"""`gradwire train`: the main job, on a cluster of its own or on a running one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradwire.cli.flags import with_flags
from gradwire.cli.interrupts import asking_first
from gradwire.cli.reporters import BarReporter, JsonReporter, LineReporter
from gradwire.cli.resuming import LOST, Needs, Resuming, wait_for_cluster
from gradwire.cluster import Cluster, connect
from gradwire.collector import collector_paused
from gradwire.job.files import text_files
from gradwire.job.reporter import Reporter
from gradwire.job.run_directory import RunDirectory
from gradwire.job.settings import JobSettings, load_job_settings, parameter_servers_of, reference_values, servers_of
from gradwire.local_cluster import LocalProcesses
from gradwire_protocol.errors import PlanError, SettingsError
from gradwire_protocol.settings import tls_files
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.v1 import coordinator_pb2

if TYPE_CHECKING:
    from gradwire.job.training import Job


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
    job_runs = _JobRuns(settings, reporter, started_at)
    try:
        with asking_first(job_runs.request_stop, settings.grace_seconds):
            if settings.coordinator is not None:
                summary = _train_there(settings, settings.coordinator, tls, resumed, job_runs, reporter)
            else:
                summary = _train_here(settings, resumed, job_runs, reporter)
    except LOST as error:
        if not job_runs.stop_requested:
            raise
        # What it was asked for: its state is in a checkpoint.
        reporter.note(error.message)
        if job_runs.directory is not None:
            reporter.note(f"go on with: gradwire train --resume {job_runs.directory.path}")
        return
    if summary["verdict"] == "different":
        raise typer.Exit(1)


def _train_there(
    settings: JobSettings,
    coordinator: str,
    tls: TlsFiles | None,
    resumed: RunDirectory | None,
    job_runs: _JobRuns,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train on a running cluster, and go on from the last checkpoint if it is lost."""

    def open_cluster() -> Cluster:
        return connect(coordinator, tls, insecure=settings.insecure)

    needs = Needs(stage_servers=servers_of(settings), parameter_servers=parameter_servers_of(settings))
    if settings.wait_seconds:
        reporter.note(f"waiting for {needs} …")
        wait_for_cluster(open_cluster, needs, settings.wait_seconds)
    # Whether or not they have come: this says what is missing.
    with open_cluster() as cluster:
        _check_servers(cluster, needs.stage_servers)
    directory = resumed or RunDirectory.create(settings.out)
    resuming = Resuming(
        open_cluster,
        needs,
        seconds=settings.reconnect_seconds,
        last_step=lambda: directory.last_step,
        note=reporter.note,
    )
    job_runs.waiting = resuming

    def attempt(cluster: Cluster, resume: bool) -> dict[str, Any]:
        return job_runs.run(cluster, None, directory, resume=resume)

    return resuming.run(attempt, resume=resumed is not None)


def _train_here(
    settings: JobSettings, resumed: RunDirectory | None, job_runs: _JobRuns, reporter: Reporter
) -> dict[str, Any]:
    """Train on a cluster of this command's own."""
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
        return job_runs.run(cluster, processes, directory, resume=resumed is not None)


class _JobRuns:
    """The job, as often as it must be begun; and whether it was asked to stop."""

    def __init__(self, settings: JobSettings, reporter: Reporter, started_at: float) -> None:
        self._settings = settings
        self._reporter = reporter
        self._started_at = started_at
        self._job: Job | None = None
        # What begins it again when its cluster is lost.
        self.waiting: Resuming | None = None
        self.stop_requested = False
        self.directory: RunDirectory | None = None

    def request_stop(self) -> bool:
        """Have the training end before its next step; return whether there is any. For a signal's handler."""
        if self._job is not None:
            asked = self._job.request_stop("this process was asked to stop")
        else:
            asked = self.waiting is not None
        if asked:
            self.stop_requested = True
            if self.waiting is not None:
                self.waiting.stop()
        return asked

    def run(
        self, cluster: Cluster, processes: LocalProcesses | None, directory: RunDirectory, *, resume: bool
    ) -> dict[str, Any]:
        self.directory = directory
        # Imports torch: late, when the servers are on their way.
        with collector_paused():
            import torch

            from gradwire.job.training import Job

        # The cores are the servers'. A second thread here would do nothing but spin between small operations.
        torch.set_num_threads(1)
        self._job = Job(self._settings)
        try:
            if processes is not None:
                processes.wait_registered(cluster)
            with self._reporter:
                return self._job.run(cluster, directory, self._reporter, self._started_at, resume=resume)
        finally:
            self._job = None


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
