"""The optimizer's state where replicas share it, and what each keeps for the exchange: brought together at one of them.

That is for checkpoints and for the client. It goes parameter after parameter, and each replica sends when it is asked,
so that no more than one parameter's state is on its way. Leaves to others: what becomes of it (`snapshot.py`,
`entries.py`), and taking it apart again (`sharding.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.exchange_state import owed_name, parse_owed_name
from gradwire_protocol.torch_tensors import dense
from gradwire_stage.exchange.collectives import Group, Receive, Steps
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.optimizer import StateValue
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

_MOST_STATES = 64
# What one replica has of a parameter's state, by torch's names.
_Part = dict[str, StateValue]


class SharedState:
    """The state of parameters in one entry, in an order that is the same at all replicas."""

    def __init__(self, run: RunState, timeline: Timeline[Any], entry: int) -> None:
        self._run = run
        self._driver = Driver(run, timeline, entry)
        self._count = 0

    def of(self, name: str) -> Mapping[str, StateValue]:
        """Return the whole state of a parameter at the replica that leads; what is here at the others."""
        run = self._run
        own = run.optimizer.state_of(name)
        is_shared = name in run.agreement.shared
        if not is_shared and not (run.agreement.owes and name in run.parameters):
            return own
        kept = run.agreement.owed(name) if run.agreement.owes else {}
        owed = {owed_name(run.replica, what): value for what, value in kept.items()}
        # What all have is the leader's to give.
        given = {**(own if is_shared or run.places.leads else {}), **owed}
        found: list[_Part] = []
        self._count += 1
        self._driver.begin(
            self._count,
            f"state{self._count}",
            lambda members: _gather(members, given, run.device.torch_device),
            found.extend,
        )
        self._driver.finish()
        if not run.places.leads:
            return own
        of_optimizer = [{key: value for key, value in part.items() if parse_owed_name(key) is None} for part in found]
        of_exchange = {key: value for part in found for key, value in part.items() if parse_owed_name(key) is not None}
        return _joined(of_optimizer, run.parameters[name].shape) | of_exchange

    def give(self, names: Iterable[str]) -> None:
        """Send what is here of these parameters' state to the replica that leads."""
        for name in names:
            self._run.check()
            self.of(name)
            self._run.progress.advance()


def _gather(group: Group, own: Mapping[str, StateValue], device: torch.device) -> Steps[list[_Part]]:
    """Return the members' parts, by place, at the first member; nothing at the others."""
    first = group.members[0]
    if group.own != first:
        yield Receive(first, "ask")
        group.send(first, "names", _described(own, device))
        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                group.send(first, f"value {key}", dense(value.detach()).clone())
        return []
    parts: list[_Part] = [dict(own)]
    for member in group.members[1:]:
        group.send(member, "ask", torch.zeros((), dtype=torch.uint8, device=device))
    for member in group.members[1:]:
        described = yield Receive(member, "names")
        part: _Part = {}
        for key, number in _read(described, member).items():
            part[key] = (yield Receive(member, f"value {key}")) if number is None else number
        parts.append(part)
    return parts


def _described(state: Mapping[str, StateValue], device: torch.device) -> torch.Tensor:
    """Return names, and numbers, as bytes of JSON; null stands for a tensor."""
    text = json.dumps({key: None if isinstance(value, torch.Tensor) else value for key, value in state.items()})
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def _read(described: torch.Tensor, member: int) -> dict[str, bool | int | float | None]:
    try:
        found = json.loads(bytes(described.cpu().tolist())) if described.dtype == torch.uint8 else None
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or len(found) > _MOST_STATES
        or not all(value is None or isinstance(value, bool | int | float) for value in found.values())
    ):
        raise FrameError(
            f"What replica {member} says of its optimizer's state cannot be read",
            expected=f"a JSON object of {_MOST_STATES} numbers at most",
            got=f"{described.numel()} elements of {described.dtype}",
        )
    return found


def _joined(parts: Iterable[_Part], shape: torch.Size) -> _Part:
    """Put the state of the slices of a parameter together, which are in the order of places."""
    held = [part for part in parts if part]
    if len(held) <= 1:
        return held[0] if held else {}
    joined: _Part = {}
    for key, first in held[0].items():
        pieces = [part[key] for part in held if key in part]
        if not isinstance(first, torch.Tensor) or first.dim() == 0:
            joined[key] = first
            continue
        tensors = [piece.reshape(-1) for piece in pieces if isinstance(piece, torch.Tensor)]
        if sum(piece.numel() for piece in tensors) != shape.numel() or len(tensors) != len(held):
            raise FrameError(
                f"The replicas' parts of the optimizer's {key!r} do not make up a parameter",
                expected=f"{shape.numel()} elements",
                got=str([piece.numel() for piece in tensors]),
            )
        joined[key] = torch.cat(tensors).view(shape)
    return joined
