"""A server registers as what its certificate says, at an address that it names."""

import pytest

from gradwire_coordinator.identity import check_identity
from gradwire_protocol.errors import NotAllowed
from gradwire_protocol.peer_roles import Peer
from gradwire_protocol.roles import Role
from gradwire_protocol.v1 import coordinator_pb2


def peer(role, *addresses):
    return Peer(role=role, name="gpu-1", addresses=addresses)


def registration(address, role=coordinator_pb2.SERVER_ROLE_STAGE):
    return coordinator_pb2.RegisterRequest(server="s", role=role, address=address)


def test_a_server_registers_as_what_its_certificate_says():
    assert check_identity(None, registration("10.0.0.7:1")) == ""
    for address in ("10.0.0.7:1", "GPU-1.lab:70", "[::1]:9"):
        assert check_identity(peer(Role.STAGE, "10.0.0.7", "gpu-1.lab", "::1"), registration(address)) == "gpu-1"
    with pytest.raises(NotAllowed, match="advertises an address") as caught:
        check_identity(peer(Role.STAGE, "10.0.0.7"), registration("10.0.0.8:1"))
    assert "--address 10.0.0.8" in caught.value.remedy
    for role, asked in (
        (Role.STAGE, coordinator_pb2.SERVER_ROLE_PARAMETER),
        (Role.PARAMETER, coordinator_pb2.SERVER_ROLE_STAGE),
        (Role.STAGE, coordinator_pb2.SERVER_ROLE_UNSPECIFIED),
        (None, coordinator_pb2.SERVER_ROLE_STAGE),
    ):
        with pytest.raises(NotAllowed, match="registers as what"):
            check_identity(peer(role, "10.0.0.7"), registration("10.0.0.7:1", asked))
