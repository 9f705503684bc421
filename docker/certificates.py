"""Gives each service of a compose cluster its certificate, each in a volume of its own: see compose.yaml.

At the first start all of them, with an authority to sign them; at later ones those that end soon, or that are for a
network of another name. Services take new files up by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gradwire.certs import members
from gradwire.certs.authority import KEY, Authority
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.roles import Role


def addresses_of(role: Role, network: str) -> tuple[str, ...]:
    """Return where a role's containers are dialled: Docker's DNS knows them by their host name and the network's."""
    return {
        Role.COORDINATOR: ("coordinator", f"coordinator.{network}"),
        Role.STAGE: (f"*.{network}",),
        Role.PARAMETER: (f"*.{network}",),
    }.get(role, ())


def provide(authority: Authority, folder: Path, role: Role, network: str) -> str:
    """Put a certificate for a role into a folder unless it has one that will do; return what was done."""
    addresses = addresses_of(role, network)
    if not (folder / "certificate.pem").exists():
        done = "issued"
    elif set(members.read_member(folder).info.addresses) != set(addresses):
        done = "issued anew: its addresses have changed"
    elif members.read_member(folder).info.is_due():
        done = "issued anew: it ended soon"
    elif (folder / "authority.pem").read_bytes() != authority.trusted_pem:
        done = "issued anew: the authority has changed"
    else:
        return "kept"
    members.issue(authority, role=role, name=str(role), addresses=addresses, folder=folder)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Provide the certificates of a compose cluster.")
    parser.add_argument("--authority", type=Path, required=True, help="Folder of the authority: made if empty")
    parser.add_argument("--members", type=Path, required=True, help="Folder with a folder for each role")
    parser.add_argument("--network", required=True, help="Name of the network that the containers are in")
    arguments = parser.parse_args()
    try:
        found = (arguments.authority / KEY).exists()
        authority = (Authority.open if found else Authority.create)(arguments.authority)
        print(f"authority: {'kept' if found else 'made'}")
        for role in (Role.COORDINATOR, Role.STAGE, Role.PARAMETER, Role.CLIENT):
            done = provide(authority, arguments.members / role, role, arguments.network)
            print(f"{role}: {done}")
    except GradwireError as error:
        raise SystemExit(f"certificates: {error}") from error


if __name__ == "__main__":
    main()
