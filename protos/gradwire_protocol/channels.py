"""Addresses, channels and credentials: how services reach each other, and when plaintext is allowed.

Plaintext is for loopback only. Elsewhere both sides prove who they are with certificates (mutual TLS): whoever dials
checks the server's host and what it serves, a server checks the caller's role (peer_roles.py).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Protocol

import grpc
import structlog

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Served
from gradwire_protocol.service_names import service_name
from gradwire_protocol.tls_files import TlsFiles

# Frames are small; unary messages carry graphs, whose nodes are a few hundred bytes each.
MAXIMUM_MESSAGE_BYTES = 64 * 2**20

# Keepalive finds a vanished host; ping_timeout makes that take seconds, not a minute (a frozen process is found by
# heartbeats). The pings rules let a silent stream be probed.
_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAXIMUM_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAXIMUM_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    # A connection of its own for each channel: bulk transfers must not hold up small messages.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A proxy from the environment is for web traffic, not for peers.
    ("grpc.enable_http_proxy", 0),
)
# How packets say that they may wait: TOS 8, which Linux's pfifo_fast and prio send last, and others as any packet.
_BULK_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.dscp", 2),)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    # A connection that has not come to its first request's door by then is closed; two minutes by default.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two servers on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
)


_log = structlog.get_logger(__name__)

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; IPv6 hosts are written in brackets, which the result keeps out."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise SettingsError(
            "Not an address", expected='HOST:PORT, such as "127.0.0.1:7070" or "[::1]:7070"', got=repr(address)
        )
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT names this machine's loopback interface."""
    host, _ = parse_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_plaintext(address: str, tls: TlsFiles | None, *, insecure: bool = False) -> None:
    """Refuse an address off loopback without TLS, unless the user insists."""
    if tls is None and not insecure and not is_loopback(address):
        raise SettingsError(
            f"Plaintext is allowed on loopback only, and {address} is not",
            expected="TLS files, or a loopback address such as 127.0.0.1",
            got="no TLS files",
            remedy="give --tls-authority, --tls-certificate and --tls-key (or --insecure on a network that you trust)",
        )


class OpenChannel(Protocol):
    """Opens a channel to HOST:PORT, with the credentials that it knows."""

    def __call__(self, address: str, *, bulk: bool = False) -> Any: ...


def open_channel(
    address: str,
    tls: TlsFiles | None = None,
    *,
    serves: Served = Served.STAGE,
    host: str | None = None,
    insecure: bool = False,
    bulk: bool = False,
) -> Any:
    """Return a grpc.Channel to HOST:PORT, with a connection of its own. Connects lazily, and again when it breaks.

    serves: what the certificate there must be for, besides the host. host: that the certificate must name, where it is
    not the one that is dialled. bulk: what is sent over it may wait where a
    network card or a router has too much to send.
    """
    check_plaintext(address, tls, insecure=insecure)
    options: tuple[tuple[str, Any], ...] = CHANNEL_OPTIONS + (_BULK_OPTIONS if bulk else ())
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    # Imports cryptography, which plaintext does not need.
    from gradwire_protocol.credentials import OwnCertificate, channel_credentials
    from gradwire_protocol.rotating_channel import RotatingChannel

    # The name that gRPC looks for in the certificate, in place of the host alone: it holds the host.
    options += (("grpc.ssl_target_name_override", service_name(host or parse_address(address)[0], serves)),)
    return RotatingChannel(
        OwnCertificate(tls),
        lambda loaded: grpc.secure_channel(address, channel_credentials(loaded), options=options),
    )


def bind(server: Any, address: str, tls: TlsFiles | None = None, *, insecure: bool = False) -> str:
    """Bind a grpc.Server to HOST:PORT (port 0: any free one) and return the address with its real port."""
    check_plaintext(address, tls, insecure=insecure)
    if tls is None:
        if not is_loopback(address):
            _log.warning(
                "plaintext, without roles: whoever reaches this address may call everything, and whoever is on the way "
                "may read and change all of it",
                address=address,
                remedy="leave --insecure out, and give --tls-authority, --tls-certificate and --tls-key",
            )
        return bind_with(server, address, None)
    exposure = tls.key_exposure()
    if exposure:
        _log.warning(exposure)
    # Imports cryptography, which plaintext does not need.
    from gradwire_protocol.credentials import OwnCertificate

    return bind_with(server, address, OwnCertificate(tls).server_credentials())


def bind_with(server: Any, address: str, credentials: Any) -> str:
    """Do what `bind` does, with grpc.ServerCredentials that are there; None: plaintext, wherever that is."""
    host, _ = parse_address(address)
    try:
        if credentials is None:
            port: int = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise SettingsError(
            f"Cannot listen on {address}",
            got=str(error),
            remedy="find who holds the port with `ss -ltnp`, or choose another (port 0: any free one)",
        ) from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
