"""How many connections a service takes: strangers who open and keep them cost a bounded amount, and no descriptors that
are needed for something else.

Whoever has no certificate gets no further than the handshake, which ends in time (channels.py). Until then a connection
costs 60 KiB at most, as measured.
"""

from __future__ import annotations

import resource

# More than ten thousand strangers, and those that belong here; at 60 KiB each, 720 MiB.
MAXIMUM_CONNECTIONS = 12_288
# For files, for connections to others and for those of one host, where so many are allowed; otherwise a quarter.
_OTHER_DESCRIPTORS = 1024


def connection_options() -> tuple[tuple[str, int], ...]:
    """Return the options of a grpc.Server that limit its connections; further ones are closed at once.

    Raises the process's own limit on descriptors, often 1,024, as far as that is needed and allowed.
    """
    descriptors = _raise_limit(MAXIMUM_CONNECTIONS + _OTHER_DESCRIPTORS)
    connections = min(MAXIMUM_CONNECTIONS, descriptors - min(_OTHER_DESCRIPTORS, descriptors // 4))
    return (("grpc.max_allowed_incoming_connections", connections),)


def _raise_limit(wanted: int) -> int:
    """Return how many descriptors this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)
