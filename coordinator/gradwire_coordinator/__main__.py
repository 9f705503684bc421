"""The `gradwire-coordinator` command: settings, the service, and an orderly end."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.log import RunLog
from gradwire_coordinator.metrics import Metrics
from gradwire_coordinator.registry import Registry
from gradwire_coordinator.service import Coordinator
from gradwire_coordinator.settings import CoordinatorSettings, load_coordinator_settings
from gradwire_protocol.allocator_options import use_one_arena
from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.health import check_health
from gradwire_protocol.roles import Served
from gradwire_protocol.serving import Service, configure_logging, exit_in_time, watch_stdin
from gradwire_protocol.v1 import coordinator_pb2_grpc


def serve(settings: CoordinatorSettings, ready_fd: int | None = None) -> None:
    """Run a coordinator in this process until it is asked to stop (SIGTERM, SIGINT) and runs have ended.

    Main thread only.
    """
    with ExitStack() as stack:
        directory = settings.state_dir
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradwire-coordinator-")))
        log = stack.enter_context(RunLog(directory))
        service = Service("gradwire-coordinator", settings.service(ready_fd))
        stack.callback(service.stop)

        def dial(address: str) -> Any:
            return open_channel(address, settings.tls, insecure=settings.insecure)

        coordinator = Coordinator(
            log=log,
            registry=Registry(lease_seconds=settings.lease_seconds, heartbeat_seconds=settings.heartbeat_seconds),
            metrics=Metrics(service.registry, version("gradwire")),
            connect=dial,
            version=version("gradwire"),
            checkpoint_root=settings.checkpoint_root,
            costs=CostBook(dial, directory=directory / "costs", seconds=settings.profiling_seconds),
        )
        stack.callback(coordinator.close)
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, service.server)  # type: ignore[no-untyped-call]
        service.install_signal_handlers()
        service.start()
        service.report_ready()
        service.wait()
        coordinator.ask_to_stop(settings.grace_seconds)
        service.finish(lambda: coordinator.has_runs, settings.grace_seconds)


def command(
    listen: Annotated[str | None, typer.Option(help="HOST:PORT to listen on; port 0: any free one.")] = None,
    advertise: Annotated[
        str | None, typer.Option(help="HOST:PORT that others dial; {hostname}: this machine's name.")
    ] = None,
    metrics_listen: Annotated[str | None, typer.Option(help="HOST:PORT of /metrics; empty: none.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Directory of the run log.")] = None,
    checkpoint_root: Annotated[
        Path | None, typer.Option(help="Directory of checkpoints that servers write and read; one for all services.")
    ] = None,
    lease_seconds: Annotated[float | None, typer.Option(help="A server this long silent is taken for lost.")] = None,
    heartbeat_seconds: Annotated[float | None, typer.Option(help="How often servers report.")] = None,
    profiling_seconds: Annotated[
        float | None, typer.Option(help="To measure a new model's nodes in, on each kind of device; 0: estimate them.")
    ] = None,
    grace_seconds: Annotated[
        float | None, typer.Option(help="From SIGTERM on, for clients to finish their steps and to save.")
    ] = None,
    tls_authority: Annotated[Path | None, typer.Option(help="PEM file of the authority that both sides trust.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of this service's certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow plaintext off loopback.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    ready_fd: Annotated[int | None, typer.Option(help="File descriptor that gets the addresses as JSON.")] = None,
    health: Annotated[
        bool, typer.Option("--health", help="Ask the coordinator that runs with these settings whether it serves.")
    ] = False,
    stdin_watch: Annotated[bool, typer.Option("--watch-stdin", help="End when standard input ends.")] = False,
) -> None:
    """Plan and coordinate pipeline training runs over registered stage servers.

    Flags go over environment variables (GRADWIRE_COORDINATOR_LISTEN, …), and those over the TOML file.
    """
    if stdin_watch:
        watch_stdin()
    flags = {
        "listen": listen,
        "advertise": advertise,
        "metrics_listen": metrics_listen,
        "state_dir": state_dir,
        "checkpoint_root": checkpoint_root,
        "lease_seconds": lease_seconds,
        "heartbeat_seconds": heartbeat_seconds,
        "profiling_seconds": profiling_seconds,
        "grace_seconds": grace_seconds,
        "tls_authority": tls_authority,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "insecure": insecure,
    }
    try:
        settings = load_coordinator_settings(flags, config)
        if health:
            check_health(settings.service(), Served.COORDINATOR)
            return
        serve(settings, ready_fd)
    except GradwireError as error:
        typer.echo(f"gradwire-coordinator: {error}", err=True)
        raise typer.Exit(1 if health else 2) from error
    exit_in_time()


def main() -> None:
    """Entry point of the command."""
    use_one_arena()
    configure_logging()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
