"""`gradwire up`: a local cluster that stays until Ctrl-C."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gradwire.cluster import Cluster
from gradwire.local_cluster import LocalProcesses

_LOOK_SECONDS = 0.5


def up(
    stages: Annotated[int, typer.Option(min=1, help="Stage servers to start")] = 2,
    parameter_servers: Annotated[int, typer.Option(min=0, help="Parameter servers to start")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each")] = 1,
    listen: Annotated[str, typer.Option(help="HOST:PORT of the coordinator; port 0: any free one")] = "127.0.0.1:0",
    log_dir: Annotated[Path | None, typer.Option(help="Where the output of the processes goes")] = None,
    weights_root: Annotated[Path | None, typer.Option(help="Directory that servers may read weights from")] = None,
    checkpoint_root: Annotated[
        Path | None, typer.Option(help="Directory that servers may write checkpoints to, and read them from")
    ] = None,
    operators: Annotated[
        list[str] | None,
        typer.Option(help="Module, or path of one, whose custom operators models may use; can be given again"),
    ] = None,
) -> None:
    """Start a coordinator and stage servers on this machine, and keep them until Ctrl-C."""
    with LocalProcesses(
        stage_servers=stages,
        parameter_servers=parameter_servers,
        threads=threads,
        listen=listen,
        log_dir=log_dir,
        weights_root=weights_root,
        checkpoint_root=checkpoint_root,
        operators=operators or (),
    ) as processes:
        with Cluster(processes.address) as cluster:
            processes.wait_registered(cluster)
        more = f", {parameter_servers} parameter servers" if parameter_servers else ""
        print(f"coordinator at {processes.address}, {stages} stage servers{more}; logs in {processes.log_dir}")
        print("connect with:")
        print(f"  gradwire train --coordinator {processes.address} --stages {stages}")
        print(f"  gradwire status --coordinator {processes.address}")
        print(f'  gradwire.connect("{processes.address}")  # in Python')
        print("Ctrl-C ends them all.", flush=True)
        while not (ended := processes.ended()):
            time.sleep(_LOOK_SECONDS)
        print(f"{', '.join(ended)} ended: ending the rest.", file=sys.stderr)
        processes.check_running()
