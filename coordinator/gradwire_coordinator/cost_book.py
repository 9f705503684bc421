"""What graphs cost on the makes of devices that are to run them: asked of servers of each make, and remembered.

Servers of one host measure at the same time, as they will compute: they share its memory and caches. Leaves to others:
what follows from it (`costs.py`), and measuring (gradwire_stage.profiling). Whatever goes wrong is logged, and then
costs are what the shapes say.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import structlog

from gradwire_coordinator.cost_files import CostFiles
from gradwire_coordinator.costs import DeviceMake, NodeCosts, node_costs, rows_per_micro_batch, trained_tensors
from gradwire_coordinator.measured_costs import MeasuredGroups, average, failures, group_ends, read_reply
from gradwire_coordinator.model_checks import IndexedModel
from gradwire_coordinator.registry import Server
from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import GradwireError, from_rpc_error
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2, stage_pb2_grpc

# Of each device that is asked, unless the coordinator is told otherwise.
PROFILING_SECONDS = 2.0
# Forward and backward of a micro-batch, by the estimate. What is over sooner spends its time elsewhere: not worth a
# user's wait.
LEAST_SECONDS = 0.01
# By the estimate: a group that takes less is not told from what surrounds it.
_LEAST_GROUP_SECONDS = 100e-6
_MOST_GROUPS = 500
# Beyond the time to measure in: for an operator that cannot be interrupted.
_PATIENCE_SECONDS = 10.0
_REMEMBERED = 64
# Servers of one make that measure, at most; more hardly say more.
_TOGETHER = 4
# In a line of the log.
_SHOWN_REASONS = 3

_log = structlog.get_logger(__name__)


class _Key(NamedTuple):
    graph: str
    make: DeviceMake
    # Of the server's software.
    version: str
    precision: int

    def digest(self) -> str:
        """Return a name for what was measured under this key."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class CostBook:
    """Measured costs by graph, make of device and precision, for any number of rows that is near. Thread-safe.

    directory: keeps them from one start of the coordinator to the next; None: nothing does. seconds: to measure in, on
    each server that is asked; 0: never measure.
    """

    def __init__(
        self, connect: Callable[[str], Any], *, directory: Path | None = None, seconds: float = PROFILING_SECONDS
    ) -> None:
        self._connect = connect
        self._files = None if directory is None else CostFiles(directory)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._known: OrderedDict[str, MeasuredGroups] = OrderedDict()

    def of(self, indexed: IndexedModel, plan: run_pb2.Plan, servers: Sequence[Server]) -> list[NodeCosts]:
        """Return what the nodes of the training graph cost on each of these servers, for a micro-batch of the plan.

        The servers must be free. What is not known is asked for where it matters: if cuts or the shares of replicas
        hang on it, and a micro-batch is not over in no time, or has custom operators, of which shapes tell nothing.
        """
        rows = rows_per_micro_batch(plan.expected_rows, plan.micro_batches)
        trained = trained_tensors(indexed.tensors)
        devices = [server.device for server in servers]
        estimates = node_costs(indexed.train, trained, rows, devices)
        shortest = min(float(costs.seconds().sum()) for costs in estimates)
        alike = len({DeviceMake.of(device) for device in devices}) == 1
        nothing_to_choose = plan.stages == 1 and alike
        if not self._seconds or nothing_to_choose or (shortest < LEAST_SECONDS and not indexed.operators):
            return estimates
        measured = self._measured(indexed, plan, servers, estimates)
        return node_costs(indexed.train, trained, rows, devices, measured)

    def _measured(
        self,
        indexed: IndexedModel,
        plan: run_pb2.Plan,
        servers: Sequence[Server],
        estimates: Sequence[NodeCosts],
    ) -> dict[DeviceMake, MeasuredGroups]:
        """Return what is known of each make of device, after asking for the rest."""
        graph = _bare(indexed.train.graph)
        name = _graph_hash(graph, indexed)
        found: dict[DeviceMake, MeasuredGroups] = {}
        asked: dict[DeviceMake, list[tuple[Server, NodeCosts]]] = {}
        for server, costs in zip(servers, estimates, strict=True):
            make = DeviceMake.of(server.device)
            if make not in found and make not in asked:
                known = self._recall(_Key(name, make, server.version, plan.precision), costs.rows)
                if known is not None:
                    found[make] = known
            if make not in found:
                asked.setdefault(make, []).append((server, costs))
        every = [pair for make in asked.values() for pair in _together(make)]
        with ThreadPoolExecutor(max(1, len(every)), thread_name_prefix="profile") as pool:
            replies = pool.map(lambda pair: self._measure(pair[0], indexed, graph, pair[1], plan), every)
            of_make: dict[DeviceMake, list[MeasuredGroups]] = {}
            for (server, _), made in zip(every, replies, strict=True):
                if made is not None:
                    of_make.setdefault(DeviceMake.of(server.device), []).append(made)
        for make, several in of_make.items():
            found[make] = average(several)
            self._remember(_Key(name, make, asked[make][0][0].version, plan.precision), found[make])
        return found

    def _measure(
        self,
        server: Server,
        indexed: IndexedModel,
        graph: graph_pb2.Graph,
        costs: NodeCosts,
        plan: run_pb2.Plan,
    ) -> MeasuredGroups | None:
        """Ask a server; None if it cannot say."""
        cuts = indexed.train.usable_cuts(indexed.mutated)
        ends = group_ends(costs.forward, cuts, least_seconds=_LEAST_GROUP_SECONDS, most=_MOST_GROUPS)
        used = set(indexed.train.tensor_positions()) | indexed.train.mutated
        rows = costs.rows
        counts = [rows]
        if any(item.batched for item in graph.inputs):
            counts.append(rows // 2 if rows > 1 else 2)
        request = stage_pb2.MeasureCostsRequest(
            graph=graph,
            tensors=[spec for name, spec in indexed.tensors.items() if name in used],
            ends=ends,
            rows=counts,
            precision=plan.precision,
            seconds=self._seconds,
            tensor=plan.tensor if plan.tensor > 1 else 0,
        )
        who = f"stage server {server.server}"
        try:
            with closing(self._connect(server.address)) as channel:
                stub = stage_pb2_grpc.StageServiceStub(channel)  # type: ignore[no-untyped-call]
                try:
                    reply = stub.MeasureCosts(request, timeout=self._seconds + _PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    raise from_rpc_error(error, target=f"the {who} at {server.address}") from error
            made = read_reply(ends, counts, reply, f"The {who}")
        except GradwireError as error:
            _log.warning("costs could not be measured, so they are estimated", server=server.server, error=str(error))
            return None
        reasons = failures(reply)
        unmeasured = int((~made.is_measured).sum())
        log = _log.warning if unmeasured else _log.info
        log(
            "costs measured",
            server=server.server,
            seconds=round(reply.seconds, 2),
            groups=len(ends),
            unmeasured=unmeasured,
            reasons=reasons[:_SHOWN_REASONS],
        )
        return made if made.is_measured.any() else None

    def _recall(self, key: _Key, rows: int) -> MeasuredGroups | None:
        name = key.digest()
        with self._lock:
            known = self._known.get(name)
            if known is None and self._files is not None:
                known = self._files.read(name)
            if known is None or not known.covers(rows):
                return None
            self._keep(name, known)
            return known

    def _remember(self, key: _Key, made: MeasuredGroups) -> None:
        name = key.digest()
        with self._lock:
            self._keep(name, made)
            # What time or memory was short for is worth another try, some day.
            if self._files is not None and made.is_measured.all():
                self._files.write(name, made)

    def _keep(self, name: str, groups: MeasuredGroups) -> None:
        self._known[name] = groups
        self._known.move_to_end(name)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


def _together(servers: Sequence[tuple[Server, NodeCosts]]) -> list[tuple[Server, NodeCosts]]:
    """Return which servers of a make are asked: some that share the host of the first."""
    host = parse_address(servers[0][0].address)[0]
    return [pair for pair in servers if parse_address(pair[0].address)[0] == host][:_TOGETHER]


def _bare(graph: graph_pb2.Graph) -> graph_pb2.Graph:
    """Return a graph without what does not change its costs: where in the user's code nodes come from."""
    made = graph_pb2.Graph()
    made.CopyFrom(graph)
    for node in made.nodes:
        node.ClearField("module_path")
        node.ClearField("source")
    return made


def _graph_hash(graph: graph_pb2.Graph, indexed: IndexedModel) -> str:
    digest = hashlib.sha256(graph.SerializeToString(deterministic=True))
    for name in sorted(indexed.tensors):
        digest.update(indexed.tensors[name].SerializeToString(deterministic=True))
    for cut in indexed.train.usable_cuts(indexed.mutated):
        digest.update(cut.to_bytes(8, "little"))
    return digest.hexdigest()
