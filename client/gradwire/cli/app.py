"""The `gradwire` command: its subcommands, and how errors and interrupts become messages and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import gradwire
from gradwire.cli.certs import certs
from gradwire.cli.plan import plan
from gradwire.cli.sample import sample
from gradwire.cli.status import status
from gradwire.cli.train import train
from gradwire.cli.up import up
from gradwire.cli.verify import verify
from gradwire_protocol.errors import (
    BatchError,
    CheckpointError,
    DataError,
    GradwireError,
    ModelError,
    OptimizerError,
    PlanError,
    SettingsError,
)

WRONG_INPUT = (BatchError, CheckpointError, DataError, ModelError, OptimizerError, PlanError, SettingsError)

app = typer.Typer(
    name="gradwire",
    help="Train PyTorch models across devices joined by ordinary networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(plan)
app.command()(up)
app.command()(status)
app.command()(sample)
app.command()(verify)
app.add_typer(certs, name="certs")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gradwire {gradwire.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train PyTorch models across devices joined by ordinary networks."""


def run() -> None:
    """Run the command and exit."""
    try:
        app()
    except GradwireError as error:
        print(describe(error), file=sys.stderr)
        sys.exit(2 if isinstance(error, WRONG_INPUT) else 1)


def describe(error: GradwireError) -> str:
    """Return an error as a short block for people."""
    lines = [f"Error: {error.message}"]
    parts = (("expected", error.expected), ("got", error.got), ("remedy", error.remedy))
    lines += [f"  {name + ':':<10}{_indented(text)}" for name, text in parts if text]
    lines += [f"  {note}" for note in getattr(error, "__notes__", ())]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 12)
