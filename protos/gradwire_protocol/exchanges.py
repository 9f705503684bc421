"""How replicas agree, as text with settings.

"ring", "local(every=50, learning_rate=0.7, momentum=0.9)", or "parameter-server(servers=1, staleness=0)".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gradwire_protocol.errors import PlanError

RING, LOCAL, PARAMETER_SERVER = "ring", "local", "parameter-server"
MAXIMUM_STALENESS = 15
MAXIMUM_PARAMETER_SERVERS = 256

_LONGEST_TEXT = 200
_MOST_STEPS = 10**9
_SETTINGS = {
    RING: (),
    LOCAL: ("every", "learning_rate", "momentum"),
    PARAMETER_SERVER: ("servers", "staleness"),
}
_WHOLE = frozenset({"every", "servers", "staleness"})
_EXPECTED = (
    '"ring", "local(every=50, learning_rate=0.7, momentum=0.9)", or "parameter-server(servers=1, staleness=0)", where '
    "any setting may be left out"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """An exchange and its settings. Those of another one have their defaults, so that equal exchanges compare equal.

    every: of "local", the steps from one average to the next. learning_rate, momentum: of its outer optimizer. servers:
    of "parameter-server", how many share the parameters. staleness: how many updates the weights may lack that a step
    begins with.
    """

    name: str = RING
    every: int = 50
    learning_rate: float = 0.7
    momentum: float = 0.9
    servers: int = 1
    staleness: int = 0

    @property
    def is_local(self) -> bool:
        """Whether replicas train alone between averages."""
        return self.name == LOCAL

    @property
    def has_servers(self) -> bool:
        """Whether parameter servers hold the weights."""
        return self.name == PARAMETER_SERVER

    def __str__(self) -> str:
        """Return the text that parses to the same exchange."""
        shown = ", ".join(f"{setting}={getattr(self, setting)!r}" for setting in _SETTINGS[self.name])
        return f"{self.name}({shown})" if shown else self.name


def parse_exchange(text: str) -> Exchange:
    """Return the exchange that a text names; PlanError where there is none such."""
    whole = re.fullmatch(r"\s*([a-z-]+)\s*(?:\((.*)\))?\s*", text, re.ASCII) if len(text) <= _LONGEST_TEXT else None
    if whole is None or whole[1] not in _SETTINGS:
        raise PlanError(
            "The exchange of the plan is none that there is",
            expected=_EXPECTED,
            got=repr(text[:100]),
            remedy='leave it out for "ring"',
        )
    name, values = whole[1], dict[str, float]()
    for part in filter(None, map(str.strip, (whole[2] or "").split(","))):
        setting, _, value = (piece.strip() for piece in part.partition("="))
        if setting not in _SETTINGS[name] or setting in values:
            raise PlanError(f"The exchange {name} has no such setting, or has it twice", expected=_EXPECTED, got=part)
        try:
            values[setting] = int(value) if setting in _WHOLE else float(value)
        except ValueError:
            values[setting] = math.nan
    found = Exchange(name=name, **values)  # type: ignore[arg-type]
    if not (1 <= found.every <= _MOST_STEPS and 0 < found.learning_rate < math.inf and 0 <= found.momentum < 1):
        raise PlanError(
            "The settings of local steps are not valid",
            expected="every: a whole number of steps, 1 or more; learning_rate: above 0; momentum: 0 to below 1",
            got=text[:100],
        )
    if not (1 <= found.servers <= MAXIMUM_PARAMETER_SERVERS and 0 <= found.staleness <= MAXIMUM_STALENESS):
        raise PlanError(
            "The settings of parameter servers are not valid",
            expected=f"servers: 1 to {MAXIMUM_PARAMETER_SERVERS}; staleness: 0 to {MAXIMUM_STALENESS} steps",
            got=text[:100],
        )
    return found
