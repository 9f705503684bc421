"""`gradwire plan`: how a job would be laid out, and what a step of it is expected to take, without running it.

Leaves showing it to cli/plan_view.py, the pictures to timeline_drawing.py and timeline_png.py.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gradwire.cli.flags import with_flags
from gradwire.cli.grid_view import grid_view
from gradwire.cli.options import read_cuts
from gradwire.cli.plan_view import picture_titles, plan_lines, plan_view
from gradwire.cluster import Cluster, connect
from gradwire.job.settings import (
    JobSettings,
    load_job_settings,
    parameter_servers_of,
    plan_of,
    reference_values,
    servers_of,
)
from gradwire.local_cluster import LocalProcesses
from gradwire.timeline_drawing import TimedAction, svg_timeline
from gradwire.timeline_png import check_available, png_timeline
from gradwire_protocol.errors import PlanError, SettingsError
from gradwire_protocol.settings import tls_files
from gradwire_protocol.v1 import coordinator_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwire.grid_search import GridSearch
    from gradwire.plan import Plan
    from gradwire.run_plan import RunPlan

_GRID = ("stages", "replicas", "tensor")
# Of a local cluster.
_AUTO_SERVERS = 4
_MODEL = ("layers", "width", "heads", "context", "batch")
_LAYOUT = (
    "stages",
    "replicas",
    "tensor",
    "tensor_plan",
    "transport",
    "microbatches",
    "schedule",
    "virtual_stages",
    "recompute",
    "activation_compression",
    "exchange",
    "every",
    "parameter_servers",
    "staleness",
    "compression",
    "zero",
    "precision",
)
_CLUSTER = ("threads", "coordinator", "tls_authority", "tls_certificate", "tls_key", "insecure")
_STANDARD_OUTPUT = "-"
_COLUMNS = 120


@with_flags(JobSettings, reference_values(), only={*_MODEL, *_LAYOUT, *_CLUSTER})
def plan(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Python file with make_model(), make_optimizer(model), make_batch(), and loss "
            "[default: the job that `gradwire train` runs]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings, such as examples/reference.toml")
    ] = None,
    cuts: Annotated[
        str | None,
        typer.Option(help="Where the stages end: module paths or node positions, with commas [default: balanced]"),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the step to this file, as SVG")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the step to this file, as PNG; needs the extra `plot`")] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Plan every grid of stages × replicas × tensor for --servers; show the best")
    ] = False,
    servers: Annotated[
        int | None, typer.Option(min=1, help="Stage servers, for --auto [default: all that are free, or 4]")
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the whole plan to this file, as JSON; -: only print that")
    ] = None,
    **flags: Any,
) -> None:
    """Show how a job would be laid out: stages and servers, the schedule, and what a step is expected to take.

    Nothing is trained. The servers are those of a coordinator, which must be free, or of a local cluster that is
    started for the moment; what links and nodes take is measured on them. The file is run as a module, as `gradwire
    verify` does it. Settings come from flags, the environment and --config, as for `gradwire train`.
    """
    settings = load_job_settings(flags, config)
    asked = plan_of(settings, read_cuts(cuts))
    if auto:
        _check_no_grid_flags(flags, cuts)
    elif servers is not None:
        raise SettingsError("--servers is for --auto", expected="both, or neither", got=f"--servers {servers}")
    if file is not None:
        _check_no_model_flags(flags)
    if png is not None:
        check_available()
    tls = tls_files(settings.tls_authority, settings.tls_certificate, settings.tls_key)
    with ExitStack() as stack:
        if settings.coordinator is not None:
            cluster = stack.enter_context(connect(settings.coordinator, tls, insecure=settings.insecure))
            count = (servers or _free_servers(cluster)) if auto else None
            search, found, name = _plan(file, settings, asked, cluster, None, count)
        else:
            count = (servers or _AUTO_SERVERS) if auto else None
            # The servers start, and import torch, while this process does.
            processes = stack.enter_context(
                LocalProcesses(
                    stage_servers=count or servers_of(settings),
                    parameter_servers=parameter_servers_of(settings),
                    threads=settings.threads,
                )
            )
            cluster = stack.enter_context(Cluster(processes.address))
            search, found, name = _plan(file, settings, asked, cluster, processes, count)
    title, subtitle = picture_titles(found, name)
    if svg is not None:
        _write(svg, svg_timeline(_timeline(found), title, subtitle).encode())
    if png is not None:
        _write(png, png_timeline(_timeline(found), title, subtitle))
    record = found.to_record() if search is None else {**search.to_record(), "plan": found.to_record()}
    text = dumps(record, indent=2) + "\n"
    if json == _STANDARD_OUTPUT:
        print(text, end="")
        return
    if json is not None:
        _write(Path(json), text.encode())
    # Where there is no terminal, nobody has a narrow one.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _COLUMNS)
    if search is not None:
        console.print(grid_view(search, console.width))
        console.print(f"\nwhy: {search.reason}\n", highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for part in plan_view(found, name, console):
        console.print(part)
    console.print()
    for line in plan_lines(found):
        # For others than people, long sentences stay lines.
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _plan(
    file: Path | None,
    settings: JobSettings,
    asked: Plan,
    cluster: Cluster,
    processes: LocalProcesses | None,
    servers: int | None,
) -> tuple[GridSearch | None, RunPlan, str]:
    """Return the plan, and what it is of. servers: search the grids for so many, and return these, too."""
    # Imports torch: late, when the servers are on their way.
    from gradwire.job.subject import load_subject, reference_subject

    subject = reference_subject(settings) if file is None else load_subject(file)
    model = subject.make_model()
    optimizer, batch = subject.make_optimizer(model), subject.make_batch()
    if processes is not None:
        processes.wait_registered(cluster)
    what: dict[str, Any] = {"loss": subject.loss, "example": batch, "plan": asked, "precision": settings.precision}
    name = f"GPT, {settings.layers} layers of {settings.width}" if file is None else file.name
    if servers is None:
        return None, cluster.plan(model, optimizer, **what), name
    search = cluster.search_grids(model, optimizer, servers=servers, **what)
    return search, search.plan, name


def _free_servers(cluster: Cluster) -> int:
    stage_servers = [server for server in cluster.status().servers if server.role == coordinator_pb2.SERVER_ROLE_STAGE]
    free = sum(not server.activity.run for server in stage_servers)
    if not free:
        raise PlanError(
            "No stage server is free",
            expected="one or more",
            got=f"{len(stage_servers)} registered, all busy",
            remedy="start more with gradwire-stage-server, or wait for other runs to end",
        )
    return free


def _check_no_grid_flags(flags: Mapping[str, Any], cuts: str | None) -> None:
    given = [name for name in _GRID if flags.get(name) is not None] + (["cuts"] if cuts is not None else [])
    if given:
        raise SettingsError(
            f"--auto finds the grid itself, so it cannot be told --{given[0]}",
            expected="--auto with --servers, or a grid",
            got=f"--auto and --{given[0]}",
            remedy="leave one of both out",
        )


def _check_no_model_flags(flags: Mapping[str, Any]) -> None:
    given = [name for name in _MODEL if flags.get(name) is not None]
    if given:
        raise SettingsError(
            f"--{given[0]} is for the GPT of `gradwire train`, and a file has a model and a batch of its own",
            expected="one of them",
            got=f"--{given[0]} {flags[given[0]]}, and a file",
            remedy=f"leave --{given[0]} out",
        )


def _timeline(plan: RunPlan) -> Sequence[TimedAction]:
    if not plan.timeline:
        raise PlanError(
            "The step has too many actions for a picture",
            got=f"{plan.micro_batches} micro-batches on {len(plan.stages)} stages",
            remedy="leave --svg and --png out, or plan with fewer --microbatches: more of them go the same way",
        )
    return plan.timeline


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise SettingsError("The file cannot be written", expected="a path in a directory", got=str(error)) from error
