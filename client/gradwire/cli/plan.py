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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwire.plan import Plan
    from gradwire.run_plan import RunPlan

_MODEL = ("layers", "width", "heads", "context", "batch")
_LAYOUT = (
    "stages",
    "replicas",
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
    if file is not None:
        _check_no_model_flags(flags)
    if png is not None:
        check_available()
    tls = tls_files(settings.tls_authority, settings.tls_certificate, settings.tls_key)
    with ExitStack() as stack:
        if settings.coordinator is not None:
            cluster = stack.enter_context(connect(settings.coordinator, tls, insecure=settings.insecure))
            found, name = _plan(file, settings, asked, cluster, None)
        else:
            # The servers start, and import torch, while this process does.
            processes = stack.enter_context(
                LocalProcesses(
                    stage_servers=servers_of(settings),
                    parameter_servers=parameter_servers_of(settings),
                    threads=settings.threads,
                )
            )
            cluster = stack.enter_context(Cluster(processes.address))
            found, name = _plan(file, settings, asked, cluster, processes)
    title, subtitle = picture_titles(found, name)
    if svg is not None:
        _write(svg, svg_timeline(_timeline(found), title, subtitle).encode())
    if png is not None:
        _write(png, png_timeline(_timeline(found), title, subtitle))
    text = dumps(found.to_record(), indent=2) + "\n"
    if json == _STANDARD_OUTPUT:
        print(text, end="")
        return
    if json is not None:
        _write(Path(json), text.encode())
    # Where there is no terminal, nobody has a narrow one.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _COLUMNS)
    for part in plan_view(found, name, console):
        console.print(part)
    console.print()
    for line in plan_lines(found):
        # For others than people, long sentences stay lines.
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _plan(
    file: Path | None, settings: JobSettings, asked: Plan, cluster: Cluster, processes: LocalProcesses | None
) -> tuple[RunPlan, str]:
    """Return the plan, and what it is of."""
    # Imports torch: late, when the servers are on their way.
    from gradwire.job.subject import load_subject, reference_subject

    subject = reference_subject(settings) if file is None else load_subject(file)
    model = subject.make_model()
    optimizer, batch = subject.make_optimizer(model), subject.make_batch()
    if processes is not None:
        processes.wait_registered(cluster)
    found = cluster.plan(model, optimizer, loss=subject.loss, example=batch, plan=asked, precision=settings.precision)
    name = f"GPT, {settings.layers} layers of {settings.width}" if file is None else file.name
    return found, name


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
