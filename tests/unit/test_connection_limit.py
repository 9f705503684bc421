"""How many connections a service takes, by how many descriptors its process may have."""

from __future__ import annotations

import resource

import pytest

from gradwire_protocol.connection_limit import MAXIMUM_CONNECTIONS, connection_options

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "connections"),
    [
        (1024, 2**20, MAXIMUM_CONNECTIONS + 1024, MAXIMUM_CONNECTIONS),
        (1024, INFINITE, MAXIMUM_CONNECTIONS + 1024, MAXIMUM_CONNECTIONS),
        (2**20, 2**20, None, MAXIMUM_CONNECTIONS),
        (INFINITE, INFINITE, None, MAXIMUM_CONNECTIONS),
        (1024, 8192, 8192, 8192 - 1024),
        (1024, 1024, None, 1024 - 256),
        (256, 400, 400, 300),
    ],
)
def test_what_is_taken(
    soft: int, hard: int, raised: int | None, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    assert dict(connection_options()) == {"grpc.max_allowed_incoming_connections": connections}
    assert limits == ([] if raised is None else [(raised, hard)])
