"""Makes tensor groups of servers: those that share one stage of one replica, each a shard of it, number 0 first.

Planning goes by groups: what is planned for the first server of one, all of its servers do. Pure. Leaves to others:
which servers there are (`registry.py`), what becomes of the groups (`replica_groups.py`), and what their exchanges take
(`group_costs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_coordinator.costs import DeviceMake
from gradwire_coordinator.registry import Server
from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import PlanError

# By shard.
Unit = tuple[Server, ...]


def make_units(servers: Sequence[Server], shards: int) -> list[Unit]:
    """Return groups of so many servers, in the order of their first ones; a multiple of that many are given.

    Those of one host are together as far as there are enough of one make on it; the others come together in the order
    given. PlanError if servers of unlike makes are left over: whoever is slower would hold up the others in every
    exchange.
    """
    if shards == 1:
        return [(server,) for server in servers]
    units: list[list[int]] = []
    left: dict[DeviceMake, list[int]] = {}
    for (_, make), members in _by_host_and_make(servers).items():
        whole = len(members) - len(members) % shards
        units += _chunks(members[:whole], shards)
        left.setdefault(make, []).extend(members[whole:])
    unlike = []
    for members in left.values():
        members.sort()
        whole = len(members) - len(members) % shards
        units += _chunks(members[:whole], shards)
        if whole < len(members):
            unlike.append(servers[members[whole]])
    if unlike:
        raise PlanError(
            f"Servers {unlike[0].server} and {unlike[1].server} would have to share a stage, but are not alike",
            expected=f"for each stage {shards} servers of the same make, with as many threads",
            got=" and ".join(f"{server.server} ({_make_words(server)})" for server in unlike[:2]),
            remedy=f"start servers of one make in multiples of {shards}, stop those that are left over, or plan a "
            "smaller tensor",
        )
    return [tuple(servers[member] for member in unit) for unit in sorted(units)]


def unit_memory(unit: Unit) -> int:
    """Return the bytes of the device that has the least; 0 where no server knows."""
    return min((server.device.memory_bytes for server in unit if server.device.memory_bytes), default=0)


def inner_links(unit: Unit) -> list[tuple[str, str]]:
    """Return the addresses of neighbours in a group, once around: their links stand for all within it."""
    if len(unit) < 2:
        return []
    around = list(zip(unit, (*unit[1:], unit[0]), strict=True))
    # Of two the way there is the way back.
    return [(first.address, second.address) for first, second in (around[:1] if len(unit) == 2 else around)]


def _by_host_and_make(servers: Sequence[Server]) -> dict[tuple[str, DeviceMake], list[int]]:
    found: dict[tuple[str, DeviceMake], list[int]] = {}
    for number, server in enumerate(servers):
        found.setdefault((host_of(server), DeviceMake.of(server.device)), []).append(number)
    return found


def _chunks(members: Sequence[int], size: int) -> list[list[int]]:
    return [list(members[start : start + size]) for start in range(0, len(members), size)]


def host_of(server: Server) -> str:
    """Return the host in the address that a server advertises."""
    return parse_address(server.address)[0]


def _make_words(server: Server) -> str:
    device = server.device
    return f"{device.name or device.kind}, {device.threads} thread{'' if device.threads == 1 else 's'}"
