"""`gradwire verify`: whether the user's model trains on a cluster as it does in one process.

Leaves the comparison to gradwire.verification, and reading the user's file to gradwire.job.subject.
"""

from __future__ import annotations

from contextlib import ExitStack
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from gradwire.cli.options import Insecure, TlsAuthority, TlsCertificate, TlsKey, read_cuts
from gradwire.cluster import Cluster, connect
from gradwire.collector import collector_paused
from gradwire.job.settings import (
    ENVIRONMENT_PREFIX,
    TENSOR_HELP,
    TENSOR_PLAN_HELP,
    TRANSPORT_HELP,
    ScheduleName,
    TensorPlanName,
    TransportName,
)
from gradwire.local_cluster import LocalProcesses
from gradwire.plan import Plan
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.settings import tls_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwire.verification import Difference, Verification


def verify(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Python file with make_model(), make_optimizer(model), make_batch(), and loss "
            "[default: the reference job's GPT]",
            show_default=False,
            # Told before anything is started, or loaded.
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="Stage servers of the pipeline")] = 2,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the pipeline that see other data")] = 1,
    tensor: Annotated[int, typer.Option(min=1, help=TENSOR_HELP)] = 1,
    tensor_plan: Annotated[TensorPlanName, typer.Option(help=TENSOR_PLAN_HELP)] = "auto",
    transport: Annotated[TransportName, typer.Option(help=TRANSPORT_HELP)] = "auto",
    microbatches: Annotated[int, typer.Option(min=1, help="Micro-batches, over all replicas")] = 4,
    schedule: Annotated[ScheduleName, typer.Option(help="Order of the work on each server")] = "auto",
    virtual_stages: Annotated[
        int, typer.Option(min=1, max=16, help="Stages on each server; some schedules need 2")
    ] = 1,
    cuts: Annotated[
        str | None,
        typer.Option(help="Where the stages end: module paths or node positions, with commas [default: balanced]"),
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip the gradient's global norm to this")] = None,
    double: Annotated[
        bool | None,
        typer.Option(
            "--double/--no-double",
            help="Compare in float64, which judges the updated weights too, or in the model's own type "
            "[default: float64]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["bf16"] | None,
        typer.Option(help="Compare under autocast, with the model's own float32 weights: implies --no-double"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tensors to show of each kind, the largest differences first")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each server of the local cluster")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar=f"{ENVIRONMENT_PREFIX}COORDINATOR", help="HOST:PORT of a running coordinator [default: a local one]"
        ),
    ] = None,
    tls_authority: TlsAuthority = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    insecure: Insecure = False,
) -> None:
    """Train one step on a cluster and one in this process, and compare loss, every gradient and every updated weight.

    The file is run as a module, not as a script. Exit code: 0 equal, 1 not equal or a failure, 2 wrong input.
    """
    if double and precision is not None:
        raise SettingsError(
            "--double and --precision cannot be used together",
            expected="one of them",
            got=f"--double --precision {precision}",
            remedy="autocast does nothing in float64",
        )
    settings: dict[str, Any] = {
        "max_grad_norm": max_grad_norm,
        "double": precision is None if double is None else double,
        "precision": precision,
    }
    plan = Plan(
        stages=stages,
        replicas=replicas,
        tensor=tensor,
        tensor_plan=tensor_plan,
        transport=transport,
        microbatches=microbatches,
        schedule=schedule,
        virtual_stages=virtual_stages,
        cuts=read_cuts(cuts),
    )
    tls = tls_files(tls_authority, tls_certificate, tls_key)
    with ExitStack() as stack:
        if coordinator is not None:
            cluster = stack.enter_context(connect(coordinator, tls, insecure=insecure))
            found = _verify(file, cluster, None, plan, settings)
        else:
            # The servers start, and import torch, while this process does.
            processes = stack.enter_context(LocalProcesses(stage_servers=stages * replicas * tensor, threads=threads))
            cluster = stack.enter_context(Cluster(processes.address))
            found = _verify(file, cluster, processes, plan, settings)
    if json:
        print(dumps(_record(found, top)))
    else:
        _show(found, top)
    if not found.equal:
        raise typer.Exit(1)


def _verify(
    file: Path | None,
    cluster: Cluster,
    processes: LocalProcesses | None,
    plan: Plan,
    settings: Mapping[str, Any],
) -> Verification:
    # Import torch: late, when the servers are on their way.
    with collector_paused():
        from gradwire.job.subject import load_subject, reference_subject
        from gradwire.verification import verify as compare

    subject = reference_subject() if file is None else load_subject(file)
    model, batch = subject.make_model(), subject.make_batch()
    if processes is not None:
        processes.wait_registered(cluster)
    return compare(
        cluster,
        model,
        subject.make_optimizer,
        loss=subject.loss,
        batch=batch,
        plan=plan,
        **settings,
    )


def _record(found: Verification, top: int) -> dict[str, Any]:
    def largest(differences: Sequence[Difference]) -> list[dict[str, Any]]:
        return [{"name": item.name, "relative": item.relative, "absolute": item.absolute} for item in differences[:top]]

    return {**found.to_record(), "gradients": largest(found.gradients), "weights": largest(found.weights)}


def _show(found: Verification, top: int) -> None:
    table = Table("what", "tensor", title="Largest differences from one process", title_justify="left")
    table.add_column("relative", justify="right")
    table.add_column("absolute", justify="right")
    absolute = abs(found.loss - found.reference_loss)
    table.add_row("loss", "", f"{found.loss_difference:.1e}", f"{absolute:.1e}", end_section=True)
    weights = "weight" if found.weights_judged else "weight (not judged)"
    for what, differences in (("gradient", found.gradients), (weights, found.weights)):
        for index, item in enumerate(differences[:top]):
            last = index == len(differences[:top]) - 1
            table.add_row(what, item.name, f"{item.relative:.1e}", f"{item.absolute:.1e}", end_section=last)
    console = Console()
    console.print(table)
    console.print(
        f"compared: the loss, {len(found.gradients)} gradients, {len(found.weights)} weights and buffers", markup=False
    )
    # Not through rich, which would break the line.
    print(found)
