"""`gradwire-stage-server`: one process that hosts pipeline stages on one device.

And `gradwire-parameter-server`: the same, but it hosts parameters and their optimizer for the replicas of runs.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwire_protocol.errors import GradwireError
from gradwire_protocol.roles import Served
from gradwire_protocol.serving import configure_logging, exit_in_time, watch_stdin
from gradwire_stage import allocator

Flag = typer.Option


def serve(
    role: Annotated[str | None, Flag(help="stage, or parameter: what runs may take it for.")] = None,
    listen: Annotated[str | None, Flag(help="HOST:PORT to listen on; port 0: any free one.")] = None,
    advertise: Annotated[
        str | None,
        Flag(help="HOST:PORT that others dial; {hostname}: this machine's name; default: the bound address."),
    ] = None,
    coordinator: Annotated[str | None, Flag(help="HOST:PORT of the coordinator.")] = None,
    metrics_listen: Annotated[str | None, Flag(help='HOST:PORT of /metrics; "": none.')] = None,
    device: Annotated[str | None, Flag(help="auto, cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, Flag(help="Compute threads.")] = None,
    server: Annotated[str | None, Flag(help="Identifier, unique; default: made up from the host's name.")] = None,
    mailbox_bytes: Annotated[int | None, Flag(help="Limit for messages that wait.")] = None,
    credit_bytes: Annotated[int | None, Flag(help="Limit for messages of one stream that wait.")] = None,
    send_bytes: Annotated[int | None, Flag(help="Limit for messages on their way to one peer.")] = None,
    outbox_bytes: Annotated[int | None, Flag(help="Limit for results that wait.")] = None,
    tensor_bytes: Annotated[int | None, Flag(help="Limit for a single tensor.")] = None,
    weights_root: Annotated[Path | None, Flag(help="Directory that runs may load safetensors files from.")] = None,
    checkpoint_root: Annotated[
        Path | None, Flag(help="Directory of checkpoints that servers write and read; one for all services.")
    ] = None,
    operators: Annotated[
        list[str] | None,
        Flag(help="Module, or path of one, whose custom operators models may use; imported at start. Repeatable."),
    ] = None,
    shared_memory: Annotated[
        bool | None,
        Flag("--shared-memory/--no-shared-memory", help="Large payloads go to servers of the same host in memory."),
    ] = None,
    shared_memory_bytes: Annotated[int | None, Flag(help="Limit for that memory; default: 1/16 of the host's.")] = None,
    shared_memory_threshold_bytes: Annotated[int | None, Flag(help="The smallest payload for it.")] = None,
    shared_memory_directory: Annotated[
        Path | None, Flag(help="Where these servers find each other; a volume of all their containers.")
    ] = None,
    grace_seconds: Annotated[
        float | None, Flag(help="From SIGTERM on, for the run's client to finish its step and to save.")
    ] = None,
    tls_authority: Annotated[Path | None, Flag(help="PEM file of the authority that both sides trust.")] = None,
    tls_certificate: Annotated[Path | None, Flag(help="PEM file of this server's certificate.")] = None,
    tls_key: Annotated[Path | None, Flag(help="PEM file of this server's key.")] = None,
    insecure: Annotated[bool | None, Flag("--insecure", help="Allow plaintext off loopback.")] = None,
    ready_fd: Annotated[int | None, Flag(help="File descriptor that gets one JSON line when ready.")] = None,
    health: Annotated[
        bool, Flag("--health", help="Ask the server that runs with these settings whether it serves.")
    ] = False,
    watch_parent: Annotated[bool, Flag("--watch-stdin", help="End when standard input ends.")] = False,
    config: Annotated[Path | None, Flag(help="TOML file with these settings.")] = None,
) -> None:
    """Serve pipeline stages, or parameters, until SIGTERM. Settings: flags over GRADWIRE_STAGE_* over the file."""
    flags: dict[str, Any] = dict(locals())
    file = flags.pop("config")
    del flags["health"]
    flags["operators"] = operators or None
    if flags.pop("watch_parent"):
        watch_stdin()
    try:
        # Imports come here, not above: torch takes a second, while the parent is watched and settings are checked.
        # Without looking for garbage, which takes a third of it: `run_server` begins with that when all is loaded.
        gc.disable()
        from gradwire_stage.settings import load_stage_settings

        settings = load_stage_settings(flags, file)
        if health:
            from gradwire_protocol.health import check_health

            check_health(settings.service(), Served.STAGE)
            return
        from gradwire_stage.server import run_server

        run_server(settings)
    except GradwireError as error:
        print(f"gradwire-stage-server: {error}", file=sys.stderr)
        raise typer.Exit(1 if health else 2) from error


def parameter_server() -> None:
    """Do what `main` does, for a server that hosts parameters."""
    sys.argv[1:1] = ["--role", "parameter"]
    main()


def main() -> None:
    allocator.configure()
    configure_logging()
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(serve)
        app()
    finally:
        exit_in_time()


if __name__ == "__main__":
    main()
