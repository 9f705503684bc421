"""What servers add up and gather over torch.distributed in place of their own messages: gloo, or NCCL on CUDA.

There is one for the tensor-parallel servers of a stage, and one for the servers of the same place in all replicas.
Members meet through the messages that they have anyway, so that nothing but torch's own connections opens a port; these
are neither encrypted nor authenticated. A process group belongs to one generation of a run, and goes with it.

Leaves to others: what is exchanged, and when (`group/tensor_group.py`, `exchange/step.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import PlanError, StageFailed
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.transports import DEVICE_OF_TORCHS, GRPC, NCCL
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.collectives import Ring, Steps
from gradwire_stage.exchange.driver import Members, replica_members
from gradwire_stage.group.tensor_group import shard_members
from gradwire_stage.mailbox import Waiting

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

# How often whoever waits looks whether the run was ended meanwhile.
_LOOK_SECONDS = 0.25
_MEET_LOOK_SECONDS = 0.001
# How long one who has told its address may take to accept a connection.
_CONNECT = timedelta(seconds=60)
# Of one exchange, by torch's clock: how long a wait may last is for the coordinator to say, which then ends the run.
_NEVER = timedelta(days=1)
# How long a broken connection waits for the run's end: the coordinator may know of a better reason, and who it was.
_REASON_SECONDS = 3.0

# Of one exchange: larger sums are made in parts, so that what goes over a slow link is seen to move.
_PART_BYTES = 16 * 2**20

# Of a run and an entry: the members, with this name for what they say to each other.
MakeMembers = Callable[["RunState", int, str], Members]


class TorchTransport:
    """The process group of the members that this server exchanges with. All make the same calls in the same order.

    For the compute thread, but for `waiting` and `abort`. The first call makes the group: all members come to it, and
    none waits elsewhere for one that is there.
    """

    def __init__(self, run: RunState, backend: str, address: str, members: MakeMembers) -> None:
        """address: HOST:PORT that this server advertises; connections are made between such hosts."""
        # What is waited for, as if it came from the next member: whoever follows such waits comes to all of them.
        self.waiting: Waiting | None = None
        self.is_ordered = backend == NCCL
        self._run = run
        self._backend = backend
        self._host, _ = parse_address(address)
        self._members = members
        self._group: Any = None
        # Exchanges that may not have ended.
        self._begun: list[Any] = []

    def all_reduce(self, tensor: torch.Tensor) -> Steps[torch.Tensor]:
        """Return the sum of what all members have, of the same bits everywhere, a new tensor."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        flat = (torch.view_as_real(total) if total.is_complex() else total).view(-1)
        options = AllreduceOptions()
        options.timeout = _NEVER
        parts = torch.split(flat, _PART_BYTES // flat.itemsize)
        begun = [self._started(self._made().allreduce([part], options), part) for part in parts]
        while begun:
            yield begun.pop(0)
        return total

    def all_gather(self, tensor: torch.Tensor) -> Steps[list[torch.Tensor]]:
        """Return what all members have, in their order; of one shape and type."""
        # As bytes, for a backend does not know all types.
        own = tensor.detach().contiguous()
        found = [torch.empty_like(own) for _ in self._now().members]
        options = AllgatherOptions()
        options.timeout = _NEVER
        work = self._made().allgather([[_as_bytes(each) for each in found]], [_as_bytes(own)], options)
        yield self._started(work, own)
        return found

    def meet(self) -> None:
        """Make the group, if that has not been done yet: wait for the other members."""
        self._made()

    def wait_until(self, what: str, is_done: Callable[[], bool], pause: Callable[[], None]) -> None:
        """Wait for something of the members, or for the run's end, which is raised. what: for displays."""
        run, members = self._run, self._now()
        key = members.key(Ring(members).next, what)
        action = run.progress.action
        self.waiting = Waiting(key._replace(micro_batch=0 if action is None else action.micro_batch), time.monotonic())
        try:
            while not is_done():
                run.check()
                pause()
        finally:
            self.waiting = None

    def failed(self, error: RuntimeError) -> StageFailed:
        """Return what to raise for an exchange that cannot be made; the run's end, where that has come, is raised."""
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            self._run.check()
            time.sleep(_LOOK_SECONDS / 10)
        return StageFailed(
            f"An exchange by {self._backend} failed",
            expected=f"connections between the hosts that servers advertise, of which this one is {self._host}",
            got=str(error)[:500],
            remedy=f'see the logs of the other servers, or use transport="{GRPC}", which needs no more than their own '
            "ports",
        )

    def abort(self) -> None:
        """End what may hold up the device; the compute thread itself looks whether the run was ended. Any thread."""
        group = self._group
        if group is not None and self.is_ordered:
            group.abort()

    def close(self) -> None:
        """Let go of the group. Idempotent."""
        self.abort()
        # No name of its own: the thread below must be the last that has it.
        held = [self._group]
        self._group = None
        self._prune()
        if self._begun:
            # Its end waits for its exchanges, which wait for other members, who may be stopped; this thread must not.
            threading.Thread(target=held.clear, name="torch-transport-end", daemon=True).start()
        self._begun.clear()

    def _made(self) -> Any:
        if self._group is None:
            run = self._run
            timeline = run.progress.timeline
            phase = None if timeline is None else timeline.switch(phases.WAIT_EXCHANGE)
            try:
                self._group = self._connected(self._now())
            except RuntimeError as error:
                raise self.failed(error) from error
            if timeline is not None and phase is not None:
                timeline.switch(phase)
        return self._group

    def _now(self) -> Members:
        return self._members(self._run, self._run.progress.entry, self._backend)

    def _connected(self, members: Members) -> Any:
        store = _MessageStore(self._run, self, members)
        ring = Ring(members)
        if self._backend == NCCL:
            torch.cuda.set_device(self._run.device.torch_device)
            return dist.ProcessGroupNCCL(store, ring.place, ring.size, dist.ProcessGroupNCCL.Options())
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = _CONNECT
        options._threads = 1
        return dist.ProcessGroupGloo(store, ring.place, ring.size, options)

    def _started(self, work: Any, tensor: torch.Tensor) -> _Exchange:
        self._prune()
        self._begun.append(work)
        return _Exchange(self._run, self, work, tensor)

    def _prune(self) -> None:
        self._begun = [work for work in self._begun if not work.is_completed()]


class _Exchange:
    """An exchange in progress (`collectives.Pending`)."""

    def __init__(self, run: RunState, transport: TorchTransport, work: Any, tensor: torch.Tensor) -> None:
        self.result = tensor
        self._run = run
        self._transport = transport
        self._work = work

    def is_done(self) -> bool:
        if not self._work.is_completed():
            return False
        self._end()
        return True

    def wait(self) -> None:
        if self._transport.is_ordered:
            # What comes later on the device comes later; this thread need not wait.
            self._end()
        else:
            self._transport.wait_until("sum", self.is_done, self._pause)

    def _pause(self) -> None:
        # Too late, or failed: which of them, `is_done` tells.
        with suppress(RuntimeError):
            self._work.wait(timedelta(seconds=_LOOK_SECONDS))

    def _end(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._transport.failed(error) from error
        self._run.progress.advance()


def make_torch_transports(
    run: RunState, request: stage_pb2.PrepareRequest
) -> tuple[TorchTransport | None, TorchTransport | None]:
    """Return what moves the sums of the own stage's shards, and those of replicas, where that is not messages.

    PlanError for what cannot be here. What replicas encode goes as messages.
    """
    backend, places = request.transport, run.places
    if backend not in DEVICE_OF_TORCHS:
        return None, None
    _check(run, backend)
    address = next(peer.address for peer in request.peers if peer.server == run.server)
    in_replicas = len(places.replica_servers) > 1 and not places.parameter_servers
    return (
        TorchTransport(run, backend, address, _shard_members) if places.shards > 1 else None,
        TorchTransport(run, backend, address, replica_members)
        if in_replicas and not parse_compression(request.compression).lossy
        else None,
    )


def _check(run: RunState, backend: str) -> None:
    device, wanted = run.device.torch_device.type, DEVICE_OF_TORCHS[backend]
    if device != wanted:
        raise PlanError(
            f"transport={backend!r} is for servers on {wanted} devices",
            expected=wanted,
            got=device,
            remedy=f'use transport="{GRPC}", or "nccl" on GPUs, "gloo" on processors',
        )
    if not (dist.is_nccl_available() if backend == NCCL else dist.is_gloo_available()):
        raise PlanError(
            f"This server's torch is without {backend}",
            expected=f"a torch that was built with {backend}",
            got=torch.__version__,
            remedy=f'use transport="{GRPC}"',
        )


def _shard_members(run: RunState, entry: int, name: str) -> Members:
    return shard_members(run, entry, 0, name)


class _MessageStore(dist.Store):  # type: ignore[name-defined,misc]
    """What the members of a process group tell each other before they are one, as messages of the run."""

    def __init__(self, run: RunState, transport: TorchTransport, members: Members) -> None:
        super().__init__()
        self._run = run
        self._transport = transport
        self._members = members
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._known[key] = bytes(value)
        content = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self._run.device.torch_device)
        for member in self._members.members:
            if member != self._members.own:
                self._members.send(member, key, content)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._transport.wait_until("meeting", lambda: self.check(keys), lambda: time.sleep(_MEET_LOOK_SECONDS))

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._has(key) for key in keys)

    def _has(self, key: str) -> bool:
        run = self._run
        for member in self._members.members:
            if key in self._known:
                return True
            if member == self._members.own:
                continue
            content = run.mailbox.poll(self._members.key(member, key))
            if content is not None:
                if not isinstance(content, tuple):
                    raise StageFailed(f"Member {member} says nothing of use under {key!r}", expected="bytes")
                self._known[key] = bytes(run.device.claim(content[0]).cpu().tolist())
        return key in self._known


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
