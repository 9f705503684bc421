"""`--health`: asks the service that runs with the same settings whether it serves, in plaintext and over mutual TLS."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from services import free_port

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire.service_process import ServiceProcess, end_all
from gradwire_protocol.channels import parse_address
from gradwire_protocol.roles import Role
from gradwire_protocol.tls_files import TlsFiles

MODULES = {Role.COORDINATOR: "gradwire_coordinator", Role.STAGE: "gradwire_stage"}


def tls_flags(files: TlsFiles) -> list[str]:
    return [
        *("--tls-authority", str(files.authority)),
        *("--tls-certificate", str(files.certificate)),
        *("--tls-key", str(files.key)),
    ]


def flags_of(role: Role, port: int, *more: str) -> list[str]:
    # A server that finds no coordinator serves nevertheless: it is tried again and again.
    joining = ["--coordinator", f"127.0.0.1:{free_port()}"] if role is Role.STAGE else []
    return ["--listen", f"127.0.0.1:{port}", "--metrics-listen", "", *joining, *more]


@contextmanager
def running(role: Role, flags: list[str], log: Path) -> Iterator[str]:
    process = ServiceProcess(str(role), MODULES[role], flags, log)
    try:
        yield process.wait_ready(time.monotonic() + 60).address
    finally:
        end_all([process], 10)


def ask(role: Role, flags: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", MODULES[role], *flags, "--health"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("role", MODULES)
def test_a_service_that_runs_is_healthy_and_one_that_does_not_is_not(role: Role, tmp_path: Path) -> None:
    flags = flags_of(role, free_port())
    with running(role, flags, tmp_path / "log"):
        answer = ask(role, flags)
        assert (answer.returncode, answer.stderr) == (0, "")
    answer = ask(role, flags)
    assert answer.returncode == 1
    assert "the service at 127.0.0.1" in answer.stderr


@pytest.mark.parametrize("role", MODULES)
def test_over_tls_with_a_certificate_for_the_advertised_name(role: Role, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority")
    host = f"{socket.gethostname()}.lab"
    files = issue(authority, role=role, name="service", addresses=["*.lab"])
    port = free_port()
    flags = flags_of(role, port, "--advertise", f"{{hostname}}.lab:{port}", *tls_flags(files))
    with running(role, flags, tmp_path / "log") as address:
        assert parse_address(address) == (host, port)
        answer = ask(role, flags)
        assert (answer.returncode, answer.stderr) == (0, "")
        # Without a certificate there is no answer.
        assert ask(role, flags_of(role, port)).returncode == 1
        # Nor is another name's taken for this one's.
        assert ask(role, flags_of(role, port, "--advertise", f"other.net:{port}", *tls_flags(files))).returncode == 1


def test_it_must_be_told_which_port(tmp_path: Path) -> None:
    answer = ask(Role.COORDINATOR, flags_of(Role.COORDINATOR, 0))
    assert answer.returncode == 1
    assert "any free port" in answer.stderr
