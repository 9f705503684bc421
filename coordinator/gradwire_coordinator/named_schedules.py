"""The schedules of the literature by name: where their stages go, and their programs.

Pure. Leaves to others: the schedules themselves (`schedules.py`, `zero_bubble.py`), and choosing (`auto_schedule.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradwire_coordinator.placement import Placement, looped, v_shaped
from gradwire_coordinator.schedules import Programs, gpipe, interleaved_1f1b, one_f_one_b
from gradwire_coordinator.zero_bubble import join_where_nobody_waits, zb_h1, zb_v
from gradwire_protocol.errors import PlanError


@dataclass(frozen=True)
class NamedSchedule:
    """virtual_stages: how many stages a server may have, (least, most)."""

    name: str
    placement: Callable[[int, int], Placement]
    programs: Callable[[int, int, int], Programs]  # of servers, micro-batches, virtual stages
    virtual_stages: tuple[int, int]
    # Whether backwards may be in two parts.
    splits: bool = False

    def check(self, virtual_stages: int) -> None:
        """PlanError if the schedule is not made for so many stages a server."""
        least, most = self.virtual_stages
        if not least <= virtual_stages <= most:
            fits = str(least) if least == most else f"{least} to {most}"
            raise PlanError(
                f"The schedule {self.name} is not made for {virtual_stages} virtual stages",
                expected=f"{fits} on each server",
                got=str(virtual_stages),
                remedy=f"set virtual_stages to {least}, or take another schedule",
            )


# More stages a server than this only multiply messages.
MAXIMUM_VIRTUAL_STAGES = 16

SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        NamedSchedule("gpipe", looped, lambda servers, count, _: gpipe(servers, count), (1, 1)),
        NamedSchedule("1f1b", looped, lambda servers, count, _: one_f_one_b(servers, count), (1, 1)),
        NamedSchedule("interleaved-1f1b", looped, interleaved_1f1b, (2, MAXIMUM_VIRTUAL_STAGES)),
        NamedSchedule(
            "zb-h1",
            looped,
            lambda servers, count, _: join_where_nobody_waits(zb_h1(servers, count)),
            (1, 1),
            splits=True,
        ),
        NamedSchedule(
            "zb-v",
            lambda servers, _: v_shaped(servers),
            lambda servers, count, _: join_where_nobody_waits(zb_v(servers, count)),
            (2, 2),
            splits=True,
        ),
    )
}


# What a plan may ask for besides: the fastest of these, or one made for the run's costs.
AUTO = "auto"


def named_schedule(name: str) -> NamedSchedule:
    """Return a schedule; PlanError if there is none of that name."""
    if name not in SCHEDULES:
        raise PlanError("Unknown schedule", expected=" or ".join((AUTO, *SCHEDULES)), got=repr(name[:40]))
    return SCHEDULES[name]


def schedule_of(name: str, placement: Placement) -> NamedSchedule:
    """Return the schedule of that name; of "auto" the one that runs ahead the least on these places."""
    if name != AUTO:
        return named_schedule(name)
    servers = 1 + max(placement)
    if len(placement) == servers:
        return SCHEDULES["1f1b"]
    return SCHEDULES["interleaved-1f1b" if placement == looped(servers, len(placement) // servers) else "zb-v"]


def check_schedule(name: str, virtual_stages: int) -> None:
    """PlanError unless a plan may ask for this schedule with so many stages on each server."""
    if name != AUTO:
        named_schedule(name).check(virtual_stages)
    elif not 1 <= virtual_stages <= MAXIMUM_VIRTUAL_STAGES:
        raise PlanError(
            "virtual_stages is out of range", expected=f"1 to {MAXIMUM_VIRTUAL_STAGES}", got=str(virtual_stages)
        )


def placements(name: str, servers: int, virtual_stages: int) -> list[Placement]:
    """Return where the stages of a schedule can go; for "auto" every way that some named schedule has."""
    if name != AUTO:
        return [named_schedule(name).placement(servers, virtual_stages)]
    found = [looped(servers, virtual_stages)]
    if SCHEDULES["zb-v"].virtual_stages[0] == virtual_stages:
        found.append(v_shaped(servers))
    return list(dict.fromkeys(found))


def named_programs(placement: Placement, micro_batches: int) -> dict[str, Programs]:
    """Return the programs of every named schedule that goes with a placement, by name.

    1F1B comes with each deeper warm-up too, up to one micro-batch more a server, as "1f1b+1", "1f1b+2", ….
    """
    servers = 1 + max(placement)
    virtual_stages = len(placement) // servers
    found = {
        name: schedule.programs(servers, micro_batches, virtual_stages)
        for name, schedule in SCHEDULES.items()
        if schedule.virtual_stages[0] <= virtual_stages <= schedule.virtual_stages[1]
        and schedule.placement(servers, virtual_stages) == placement
    }
    if "1f1b" in found:
        deepest = min(servers, max(0, micro_batches - 2)) if servers > 1 else 0
        found |= {f"1f1b+{extra}": one_f_one_b(servers, micro_batches, extra) for extra in range(1, deepest + 1)}
    return found
