"""Names that hold a host and what is served there, for the one comparison of names that gRPC makes for whoever dials.

See certificates.py, which writes them; this is apart so that dialling needs no cryptography to be imported.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from gradwire_protocol.roles import Served

# Reserved for names that nobody can register or resolve (RFC 2606).
NEVER_RESOLVED = ".gradwire.invalid"


def service_name(host: str, served: Served) -> str:
    """Return the name: `10.0.0.7.stage-service.gradwire.invalid`. IPv6 numbers are written out, with hyphens."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        label = host.lower()
    else:
        label = str(number) if number.version == 4 else number.exploded.replace(":", "-")
    return f"{label}.{served}{NEVER_RESOLVED}"


def names_host(names: Iterable[str], host: str) -> bool:
    """Whether a certificate with these names and numbers is one for a host; `*.lab` stands for one label."""
    host = _plain(host)
    for name in map(_plain, names):
        if name == host or (name.startswith("*.") and host.partition(".")[2] == name[2:] != ""):
            return True
    return False


def _plain(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")
