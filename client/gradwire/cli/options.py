"""Options that several subcommands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradwire.job.settings import ENVIRONMENT_PREFIX

Coordinator = Annotated[
    str, typer.Option(envvar=f"{ENVIRONMENT_PREFIX}COORDINATOR", help="HOST:PORT of a running coordinator")
]
TlsAuthority = Annotated[
    Path | None,
    typer.Option(envvar=f"{ENVIRONMENT_PREFIX}TLS_AUTHORITY", help="PEM file of the authority that both sides trust"),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(envvar=f"{ENVIRONMENT_PREFIX}TLS_CERTIFICATE", help="PEM file of this client's certificate"),
]
TlsKey = Annotated[
    Path | None, typer.Option(envvar=f"{ENVIRONMENT_PREFIX}TLS_KEY", help="PEM file of this client's key")
]
Insecure = Annotated[bool, typer.Option(help="Allow plaintext off loopback, on a network that you trust")]


def read_cuts(text: str | None) -> list[int | str] | None:
    """Return --cuts as a plan has it: node positions and module paths."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdecimal() else part for part in parts]
