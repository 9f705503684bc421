"""That a server is who it says: its registration must agree with the certificate that it calls with.

Otherwise a stage server could register under another's address, and be sent its tensors. Plaintext proves nothing.
"""

from __future__ import annotations

from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import NotAllowed
from gradwire_protocol.peer_roles import Peer
from gradwire_protocol.roles import Role
from gradwire_protocol.service_names import names_host
from gradwire_protocol.v1 import coordinator_pb2

_ROLES = {Role.STAGE: coordinator_pb2.SERVER_ROLE_STAGE, Role.PARAMETER: coordinator_pb2.SERVER_ROLE_PARAMETER}


def check_identity(peer: Peer | None, request: coordinator_pb2.RegisterRequest) -> str:
    """Return the name of the certificate that holds a registration, empty for plaintext.

    NotAllowed if role or address are not the certificate's; SettingsError for what is not an address.
    """
    if peer is None:
        return ""
    if peer.role is None or _ROLES.get(peer.role) != request.role:
        raise NotAllowed(
            f"Server {request.server[:64]} registers as what its certificate is not for",
            expected=f"a certificate of the role {'parameter' if peer.role is Role.STAGE else 'stage'}",
            got=f"one of the role {peer.role}, for {peer.name!r}",
            remedy="start the other kind of server, or issue a certificate of its --role",
        )
    host, _ = parse_address(request.address[:300])
    if not names_host(peer.addresses, host):
        raise NotAllowed(
            f"Server {request.server[:64]} advertises an address that its certificate does not name",
            expected=f"one of {', '.join(peer.addresses) or 'no address: it names none'}",
            got=host,
            remedy=f"issue a certificate with --address {host}, or advertise an address that it names",
        )
    return peer.name
