"""`gradwire certs`: a development authority, its certificates, and how new members of a cluster get theirs."""

from __future__ import annotations

import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import MEMBERS, Role

# Importing gradwire.certs imports cryptography, which other commands need not wait for.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwire.certs.members import Member
    from gradwire_protocol.certificates import CertificateInfo

certs = typer.Typer(no_args_is_help=True, help="Certificates for mutual TLS: who is who in a cluster.")

Directory = Annotated[Path, typer.Argument(help="The authority's directory")]
RoleOption = Annotated[str, typer.Option("--role", help=f"What its holder is: {', '.join(MEMBERS)}")]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--address", help="Host name or IP number at which it is dialled; can be given again"),
]
Days = Annotated[float, typer.Option(min=0.001, help="How long certificates are valid")]


@certs.command()
def init(
    directory: Directory,
    years: Annotated[float, typer.Option(min=0.01, max=100, help="How long the authority is valid")] = 10.0,
) -> None:
    """Make a development authority."""
    from gradwire.certs.authority import CERTIFICATES, KEY, Authority

    authority = Authority.create(directory, years=years)
    print(
        f"{directory / CERTIFICATES}: the authority, valid until {authority.certificate.not_valid_after_utc:%Y-%m-%d}"
    )
    print(f"{directory / KEY}: its key; whoever reads it can issue for any role")
    print(f"next: gradwire certs issue {directory} --role coordinator --name coordinator --address HOST")


@certs.command()
def issue(
    directory: Directory,
    role: RoleOption,
    name: Annotated[str, typer.Option(help="Of its holder, for messages and to tell servers apart")],
    address: Addresses = None,
    days: Days = 365.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the three files; default: DIRECTORY/NAME")] = None,
) -> None:
    """Make a key and its certificate for one member of the cluster."""
    from gradwire.certs import members
    from gradwire.certs.authority import Authority

    files = members.issue(
        Authority.open(directory),
        role=_role(role),
        name=name,
        addresses=address or (),
        life=timedelta(days=days),
        folder=out,
    )
    print(f"{files.certificate.parent}: authority.pem, certificate.pem, key.pem; give them as")
    print(f"  --tls-authority {files.authority} --tls-certificate {files.certificate} --tls-key {files.key}")


@certs.command()
def rotate(
    directory: Directory,
    folder: Annotated[
        list[Path] | None, typer.Option(help="A folder outside of the directory, made with --out; can be given again")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that have long to live")] = False,
    authority: Annotated[
        bool, typer.Option("--authority", help="Replace the authority's key too; the former stays trusted for now")
    ] = False,
    distrust_former: Annotated[
        bool, typer.Option(help="Trust former authorities no more: their keys are not safe any longer")
    ] = False,
    years: Annotated[float, typer.Option(min=0.01, max=100, help="How long a new authority is valid")] = 10.0,
) -> None:
    """Issue certificates anew that end soon. Services and clients take them up by themselves."""
    from gradwire.certs import members
    from gradwire.certs.authority import Authority

    issuer = Authority.open(directory)
    if authority:
        issuer = issuer.renewed(years=years)
    if distrust_former:
        issuer = issuer.without_former()
    count = 0
    for member in (*members.members_of(directory), *map(members.read_member, folder or ())):
        if everything or authority or distrust_former or member.info.is_due():
            files = members.reissue(issuer, member)
            until = members.read_member(member.folder).info.not_after
            print(f"{files.certificate}: {member.info.role} {member.info.name}, now until {until:%Y-%m-%d %H:%M} UTC")
            count += 1
    print(f"{count} issued anew" if count else "none ends soon (--all: issue anew in any case)")


@certs.command()
def show(
    place: Annotated[Path, typer.Argument(help="A certificate, a member's folder, or the authority's directory")],
) -> None:
    """Show certificates: role, name, addresses, how long they are valid."""
    from gradwire.certs.members import members_of, read_member
    from gradwire_protocol.certificates import CertificateInfo, read_certificates

    found: list[tuple[str, CertificateInfo]] = []
    if place.is_dir():
        folders: Sequence[Member] = list(members_of(place))
        if (place / "certificate.pem").exists():
            folders = [read_member(place), *folders]
        if (place / "authority.key").exists():
            found += _authorities(place / "authority.pem")
        found += [(str(member.folder), member.info) for member in folders]
    else:
        try:
            found = [
                (str(place), CertificateInfo.of(each)) for each in read_certificates(place.read_bytes(), str(place))
            ]
        except OSError as error:
            raise SettingsError(f"Cannot read {place}", got=str(error)) from None
    if not found:
        raise SettingsError(f"There are no certificates in {place}", remedy="issue some with `gradwire certs issue`")
    _print_table(found)


@certs.command()
def token(
    directory: Directory,
    role: RoleOption,
    minutes: Annotated[float, typer.Option(min=0.01, max=7 * 24 * 60, help="How long it can be used")] = 30.0,
    uses: Annotated[int, typer.Option(min=1, max=10_000, help="How often it can be used")] = 1,
    name: Annotated[str, typer.Option(help="The only name to join with; default: any")] = "",
    address: Annotated[
        list[str] | None,
        typer.Option(help="The only addresses to join with; can be given again; default: any"),
    ] = None,
) -> None:
    """Make a join token and print it: with it a new member gets its certificate from `gradwire certs serve`."""
    from gradwire.certs.authority import Authority
    from gradwire.certs.tokens import TokenBook

    made = TokenBook(directory).make(
        role=_role(role),
        fingerprint=Authority.open(directory).fingerprint,
        seconds=60.0 * minutes,
        uses=uses,
        name=name,
        addresses=address or (),
    )
    print(made)


@certs.command()
def serve(
    directory: Directory,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0: any free one")] = "127.0.0.1:7071",
    days: Days = 90.0,
) -> None:
    """Answer `gradwire certs join`, until Ctrl-C or SIGTERM. Over TLS; for holders of a join token only."""
    from gradwire.certs.enrolment import EnrolmentServer
    from gradwire_protocol.serving import configure_logging

    configure_logging()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with EnrolmentServer(directory, listen, life=timedelta(days=days)) as server:
        print(f"enrolment service at {server.address}; join with:", flush=True)
        print(f"  gradwire certs join {server.address} --token TOKEN --out FOLDER --address HOST", flush=True)
        ended.wait()


@certs.command()
def join(
    service: Annotated[str, typer.Argument(help="HOST:PORT of `gradwire certs serve`")],
    token: Annotated[str, typer.Option(envvar="GRADWIRE_JOIN_TOKEN", help="As `gradwire certs token` has printed it")],
    out: Annotated[Path, typer.Option(help="Folder for the three files")],
    name: Annotated[str, typer.Option(help="Of this member; default: this machine's name")] = "",
    address: Addresses = None,
) -> None:
    """Get a certificate with a join token. The key is made here, and stays here."""
    from gradwire.certs.join import join as join_cluster
    from gradwire.certs.tokens import JoinToken

    files = join_cluster(
        service,
        JoinToken.parse(token),
        name=name or socket.gethostname().split(".")[0],
        addresses=address or (),
        folder=out,
    )
    print(f"{out}: authority.pem, certificate.pem, key.pem; give them as")
    print(f"  --tls-authority {files.authority} --tls-certificate {files.certificate} --tls-key {files.key}")


def _role(text: str) -> Role:
    if text not in [str(role) for role in MEMBERS]:
        raise SettingsError("There is no such role", expected=", ".join(MEMBERS), got=repr(text[:80]))
    return Role(text)


def _authorities(path: Path) -> list[tuple[str, CertificateInfo]]:
    from gradwire_protocol.certificates import CertificateInfo, read_certificates

    return [(str(path), CertificateInfo.of(each)) for each in read_certificates(path.read_bytes(), str(path))]


def _print_table(found: Sequence[tuple[str, CertificateInfo]]) -> None:
    from rich.console import Console

    from gradwire.cli.tables import Column, table

    console = Console()
    infos = [info for _, info in found]
    lefts = [info.left() / timedelta(days=1) for info in infos]
    console.print(
        table(
            "Certificates",
            [
                Column("role", [str(info.role or "authority or none") for info in infos]),
                Column("name", [info.name for info in infos]),
                Column("addresses", [", ".join(info.addresses) for info in infos], is_text=True),
                Column("valid until", [f"{info.not_after:%Y-%m-%d %H:%M}" for info in infos]),
                Column("days left", [f"{left:.1f}" for left in lefts]),
                Column("fingerprint", [info.fingerprint[:16] for info in infos], expendable=2),
                Column("file", [place for place, _ in found], expendable=1, is_text=True),
            ],
            console.width,
        ),
        soft_wrap=False,
    )
    for (place, info), left in zip(found, lefts, strict=True):
        if left <= 0:
            console.print(f"{place}: {info.name} has expired", style="red", highlight=False)
        elif info.is_due():
            console.print(f"{place}: {info.name} ends soon: gradwire certs rotate", style="yellow", highlight=False)
