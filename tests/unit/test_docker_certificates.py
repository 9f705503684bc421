"""The compose file's one-shot service: certificates at the first start, and what it renews at later ones."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from gradwire.certs import members
from gradwire.certs.authority import Authority
from gradwire_protocol.roles import Role

SCRIPT = Path(__file__).parents[2] / "docker/certificates.py"
ROLES = ("coordinator", "stage", "parameter", "client")
KEPT = ["authority: kept", *(f"{role}: kept" for role in ROLES)]
Provide = Callable[..., list[str]]


@pytest.fixture
def provide(tmp_path: Path) -> Provide:
    """Runs the service, as in a cluster whose volumes are folders; what it says."""
    for folder in ("authority", *(f"members/{role}" for role in ROLES)):
        (tmp_path / folder).mkdir(parents=True)

    def run(network: str = "gradwire", code: int = 0) -> list[str]:
        places = [f"--authority={tmp_path / 'authority'}", f"--members={tmp_path / 'members'}", f"--network={network}"]
        done = subprocess.run(
            [sys.executable, SCRIPT, *places], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        return (done.stdout if code == 0 else done.stderr).splitlines()

    return run


def keys(tmp_path: Path) -> dict[str, bytes]:
    return {role: (tmp_path / "members" / role / "key.pem").read_bytes() for role in ROLES}


def test_the_first_start_gives_each_service_its_own(provide: Provide, tmp_path: Path) -> None:
    assert provide() == ["authority: made", *(f"{role}: issued" for role in ROLES)]
    for role in ROLES:
        folder = tmp_path / "members" / role
        info = members.read_member(folder).info
        assert info.role == role
        hosts: dict[str, set[str]] = {"coordinator": {"coordinator", "coordinator.gradwire"}, "client": set()}
        # Servers are dialled by their containers' names.
        assert set(info.addresses) == hosts.get(role, {"*.gradwire"})
        assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
        assert not list(folder.rglob("authority.key"))


def test_a_second_start_changes_nothing(provide: Provide, tmp_path: Path) -> None:
    provide()
    before = keys(tmp_path)
    assert provide() == KEPT
    assert keys(tmp_path) == before


def test_what_ends_soon_is_renewed_and_nothing_else(provide: Provide, tmp_path: Path) -> None:
    provide()
    folder = tmp_path / "members/stage"
    addresses = members.read_member(folder).info.addresses
    # Almost over when it is made: certificates begin five minutes early.
    authority = Authority.open(tmp_path / "authority")
    members.issue(
        authority, role=Role.STAGE, name="stage", addresses=addresses, life=timedelta(seconds=1), folder=folder
    )
    before = keys(tmp_path)
    said = provide()
    assert said == [*KEPT[:2], "stage: issued anew: it ended soon", *KEPT[3:]]
    changed = {role for role, key in keys(tmp_path).items() if key != before[role]}
    assert changed == {"stage"}
    assert not members.read_member(folder).info.is_due()


def test_a_network_of_another_name_gets_others(provide: Provide, tmp_path: Path) -> None:
    provide()
    said = provide("other")
    assert said[-1] == "client: kept"
    assert said[1:4] == [f"{role}: issued anew: its addresses have changed" for role in ROLES[:3]]
    assert "*.other" in members.read_member(tmp_path / "members/stage").info.addresses


def test_a_new_authority_is_told_to_all(provide: Provide, tmp_path: Path) -> None:
    provide()
    Authority.open(tmp_path / "authority").renewed()
    assert provide()[1:] == [f"{role}: issued anew: the authority has changed" for role in ROLES]


def test_what_cannot_be_written_is_said(provide: Provide, tmp_path: Path) -> None:
    (tmp_path / "members/stage").rmdir()
    (tmp_path / "members/stage").write_text("")
    (said,) = provide(code=1)
    assert said.startswith("certificates: Cannot write certificates to")
