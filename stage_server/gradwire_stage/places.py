"""Who is who in a run, as one of its servers sees it: its pipeline, the other replicas, its shards, parameter servers.

Worked out once, when a run is prepared. Order is that of ids, so that sums have the same order everywhere.

Tensor-parallel servers of the same stages and the same replica are a *group*; each is one *shard*. What pipelines and
replicas exchange stays among the servers of one shard: all that is said of them here is said of those.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.v1 import stage_pb2


class Places:
    """The servers of a run by what they do for this one."""

    def __init__(self, request: stage_pb2.PrepareRequest, own: stage_pb2.Peer) -> None:
        self.own = own.server
        self.replica = own.replica
        self.shard = own.shard
        self.is_parameter_server = own.parameter_server
        hosts = [peer for peer in request.peers if not peer.parameter_server]
        self.shards = len({peer.shard for peer in hosts})
        # The servers of the own group, by shard, ascending.
        self.group_servers = {
            peer.shard: peer.server
            for peer in sorted(hosts, key=lambda peer: peer.shard)
            if peer.replica == own.replica and peer.stages == own.stages
        }
        workers = [peer for peer in hosts if peer.shard == own.shard]
        helpers = sorted((peer for peer in request.peers if peer.parameter_server), key=lambda peer: peer.stages[0])
        pipeline = sorted((peer for peer in workers if peer.replica == own.replica), key=lambda peer: peer.stages[0])
        self.server_of_stage = {stage: peer.server for peer in (*pipeline, *helpers) for stage in peer.stages}
        # By replica and stage; parameter servers, which are of none, have replica 0.
        self.server_at = {(peer.replica, stage): peer.server for peer in (*workers, *helpers) for stage in peer.stages}
        # First stage and name of every server of the pipeline, in stage order: the order in which sums are made.
        self.servers = tuple((peer.stages[0], peer.server) for peer in pipeline)
        self.other_servers = tuple(name for _, name in self.servers if name != own.server)
        self.everyone_else = tuple(peer.server for peer in request.peers if peer.server != own.server)
        self.first_stages = {peer.server: peer.stages[0] for peer in request.peers}
        # The servers of the same stages, by replica, ascending.
        self.replica_servers = {
            peer.replica: peer.server
            for peer in sorted(workers, key=lambda peer: peer.replica)
            if peer.stages == own.stages
        }
        self.replicas = tuple(sorted({peer.replica for peer in workers}))
        # One replica leads: what all of them have, or have parts of, is brought together there. What parameter servers
        # hold, they answer for.
        self.leads = self.is_parameter_server or own.replica == self.replicas[0]
        # One shard speaks for its group: it has the results of a forward that the client collects.
        self.speaks = self.is_parameter_server or own.shard == min(self.group_servers)
        # One server answers for all that have its stages: it gives state and gradients to the client, and writes
        # checkpoints.
        self.answers = self.leads and self.speaks
        self.last_stage = request.stages - 1
        self.last_server = self.server_of_stage[self.last_stage]
        self.parameter_servers = tuple(peer.server for peer in helpers)
        alone = request.HasField("local_steps")
        # The replicas whose losses make up the weight that gradients are divided by.
        self.weighed_replicas = (own.replica,) if alone else self.replicas
        # Who divides by it, besides this server.
        readers: Sequence[stage_pb2.Peer] = helpers or (pipeline if alone else workers)
        self.weight_readers = tuple(peer.server for peer in readers if peer.server != own.server)
        # Replica, first stage and name of all whose squares make up the norm.
        shared = workers if request.shard_optimizer else pipeline
        self.norm_servers = sorted((peer.replica, peer.stages[0], peer.server) for peer in helpers or shared)

    def holders(self, stages: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """First holding stage and name of each server of this pipeline that holds a tensor, in stage order.

        A parameter server adds up what all of them push: it holds alone what it has.
        """
        if self.is_parameter_server:
            return ((self.first_stages[self.own], self.own),)
        first: dict[str, int] = {}
        for stage in stages:
            first.setdefault(self.server_of_stage[stage], stage)
        return tuple((stage, server) for server, stage in first.items())
