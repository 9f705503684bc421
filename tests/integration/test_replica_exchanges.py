"""What replicas agree on, in real processes: codecs, a shared optimizer; and who is named if one fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
import torch.nn.functional as F
from cluster_processes import wait_until_free
from replica_subject import (
    check_first_step,
    check_replicas_are_one,
    check_weights,
    make_batch,
    make_tied_model,
    one_process,
    train,
)
from safetensors.torch import load_file
from torch import nn

import gradwire
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import tensors_pb2 as pb


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=4, checkpoint_root=tmp_path_factory.mktemp("checkpoints")) as made:
        yield made


@pytest.mark.parametrize("codec", ["none", "fp16", "bf16", "int8", "topk(density=0.1, warm_up=2)", "powersgd(rank=2)"])
def test_replicas_have_the_same_bits_under_every_codec(cluster: gradwire.Cluster, codec: str) -> None:
    with train(cluster, compression=codec, microbatches=2) as trainer:
        losses = []
        for seed in range(6):
            losses.append(trainer.step(*make_batch(seed % 2)).loss)
            check_replicas_are_one(trainer)
        assert losses[4] < losses[0]
        assert losses[5] < losses[1]
        check = trainer.state_dict()
        assert trainer.plan.compression == codec
    exact = one_process(0).state_dict()
    assert all(not torch.equal(check[name], exact[name]) for name in exact)


@pytest.mark.parametrize(
    ("stages", "optimizer", "zero"), [(2, "AdamW", "auto"), (1, "AdamW", "off"), (1, "Adafactor", "on")]
)
def test_a_shared_optimizer_updates_as_one_does(
    cluster: gradwire.Cluster, tmp_path: Path, stages: int, optimizer: str, zero: str
) -> None:
    """Weights, gradients, the norm; its checkpoint, which one replica goes on from; and that one's, shared again."""
    asked = {"stages": stages, "cuts": ["2"] if stages > 1 else None, "zero": zero}
    with train(cluster, optimizer, **asked) as trainer:
        assert trainer.plan.shards_optimizer == (zero != "off")
        check_first_step(trainer)
        trainer.step(*make_batch(1))
        trainer.save(tmp_path / "a")
        check_weights(trainer.state_dict(), one_process(2, optimizer))
    with train(cluster, optimizer, stages=1, replicas=1, cuts=None) as trainer:
        trainer.load(tmp_path / "a")
        trainer.step(*make_batch(2))
        trainer.save(tmp_path / "b")
        check_weights(trainer.state_dict(), one_process(3, optimizer))
    with train(cluster, optimizer, **asked, replicas=2) as trainer:
        trainer.load(tmp_path / "b")
        trainer.step(*make_batch(3))
        check_weights(trainer.state_dict(), one_process(4, optimizer))
        check_replicas_are_one(trainer)


@pytest.mark.parametrize(
    "fields", [{"compression": "topk(density=0.1)"}, {"compression": "int8", "exchange": "local", "every": 2}], ids=str
)
def test_another_state_ends_what_was_kept_from_step_to_step(
    cluster: gradwire.Cluster, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """What codecs still owe, and what local steps last agreed on, belongs to the state before."""
    with train(cluster, **fields) as trainer:
        trainer.step(*make_batch(0))
        trainer.step(*make_batch(1))
        trainer.save(tmp_path / "a")
        ends = []
        for _ in range(2):
            trainer.load(tmp_path / "a")
            for seed in range(2, 6):
                trainer.step(*make_batch(seed))
            ends.append(trainer.state_dict())
        for name, weight in ends[0].items():
            assert torch.equal(weight, ends[1][name]), name


@pytest.mark.parametrize("storage", ["client", "server"])
@pytest.mark.parametrize(
    ("codec", "stages"),
    [("int8", 2), ("topk(density=0.1, momentum=0.9)", 1), ("powersgd(rank=1)", 1)],
)
def test_a_resumed_run_owes_what_the_other_did(
    cluster: gradwire.Cluster, tmp_path: Path, codec: str, stages: int, storage: Any
) -> None:
    """Every bit: what replicas keep for the exchange is in the checkpoint, of each of them."""
    path = tmp_path / "a" if storage == "client" else Path(f"{codec[:4]}-{stages}")
    asked = {"compression": codec, "stages": stages, "cuts": ["2"] if stages > 1 else None}
    with train(cluster, **asked) as trainer:
        for seed in range(3):
            trainer.step(*make_batch(seed))
        trainer.save(path, storage=storage)
        losses = [trainer.step(*make_batch(seed)).loss for seed in range(3, 6)]
        state = trainer.state_dict()
    with train(cluster, **asked) as trainer:
        trainer.load(path, storage=storage)
        assert [trainer.step(*make_batch(seed)).loss for seed in range(3, 6)] == losses
        for name, weight in trainer.state_dict().items():
            assert torch.equal(weight, state[name]), name
    # Others take what is of use to them: another codec, other stages, no other replica.
    for change in ({"compression": "none"}, {"stages": 2, "cuts": ["3"]}, {"replicas": 1}):
        with train(cluster, **asked | change) as trainer:
            trainer.load(path, storage=storage)
            assert trainer.step(*make_batch(3)).step == 4


def test_what_is_tied_over_stages_counts_once_in_the_norm_under_a_shared_optimizer(cluster: gradwire.Cluster) -> None:
    """Every replica updates a tied parameter whole, while the others are shared out."""
    with train(cluster, model=make_tied_model(), zero="on", cuts=["4"]) as trainer:
        reference = make_tied_model()
        F.mse_loss(reference(make_batch(0)[0]), make_batch(0)[1]).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item()
        assert trainer.step(*make_batch(0)).gradient_norm == pytest.approx(norm, rel=1e-10)
        trainer.step(*make_batch(1))
        check_weights(trainer.state_dict(), one_process(2, model=make_tied_model()))


def test_what_is_tied_over_stages_is_resumed_under_a_codec(cluster: gradwire.Cluster, tmp_path: Path) -> None:
    """Each holder owes for its own uses of the parameter; a checkpoint has what the first one owes, for that one."""
    asked = {"cuts": ["4"], "compression": "topk(density=0.2)"}
    with train(cluster, model=make_tied_model(), **asked) as trainer:
        for seed in range(3):
            trainer.step(*make_batch(seed))
        trainer.save(tmp_path / "a")
    with train(cluster, model=make_tied_model(), **asked) as trainer:
        trainer.load(tmp_path / "a")
        trainer.save(tmp_path / "b")
        trainer.step(*make_batch(3))
        check_replicas_are_one(trainer)
    first, second = (load_file(tmp_path / name / "optimizer.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert sum(".unsent" in name for name in first) == 2 * len(list(make_tied_model().parameters()))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # Who sends nearly everything sends what is owed: once, though two stages hold the tied one.
    with train(cluster, model=make_tied_model(), **asked | {"compression": "topk(density=1.0)"}) as trainer:
        trainer.load(tmp_path / "a")
        reference = make_tied_model()
        reference.load_state_dict(trainer.state_dict())
        x, y = make_batch(3)
        result, gradients = trainer.step_with_gradients(x, y)
    F.mse_loss(reference(x), y).backward()
    assert result.gradient_norm is not None
    scale = max(1.0, result.gradient_norm / 0.5)
    for name, parameter in reference.named_parameters():
        owed = sum(first[f"{name}/exchange{replica}.unsent"] for replica in (0, 1)) / len(x)
        assert parameter.grad is not None
        assert name != "2.weight" or owed.abs().amax() > 0.05 * parameter.grad.abs().amax()
        assert torch.allclose(
            scale * gradients[name], parameter.grad + owed, rtol=0, atol=0.01 * float(owed.abs().amax())
        )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"zero": "on", "compression": "int8"}, "undo what int8 saves"),
        ({"zero": "on", "exchange": "local"}, "whole of it each"),
        ({"exchange": "gossip"}, "none that there is"),
        ({"exchange": "ring", "every": 3}, "of no use to this exchange"),
        ({"compression": "zip"}, "zip"),
    ],
)
def test_what_does_not_go_together_is_refused(cluster: gradwire.Cluster, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(gradwire.PlanError, match=expected):
        train(cluster, **fields)


def test_garbage_in_the_ring_ends_the_step_with_its_sender(cluster: gradwire.Cluster) -> None:
    """A message that a replica is about to get comes first from somebody else, and is no part of its gradients."""
    with train(cluster, stages=1, cuts=None) as trainer:
        victim = next(server for server in cluster.status().servers if server.server == trainer.servers[0])
        garbage = torch.zeros(5, dtype=torch.float64)
        key = pb.MessageKey(
            run=trainer.run_id,
            generation=1,
            entry=2,  # the first step, after the weights
            value="0/s0",
            direction=pb.DIRECTION_REDUCE,
            source_member=1,
        )
        header = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(garbage))
        with grpc.insecure_channel(victim.address) as channel:
            deliver = channel.stream_stream("/gradwire_protocol.v1.StageService/Deliver")
            assert len(list(deliver(encode_frames(header, payload_of(garbage))))) == 1
        with pytest.raises(gradwire.GradwireError, match="member 1") as caught:
            trainer.step(*make_batch(0))
        assert victim.server in str(caught.value)
    wait_until_free(cluster)


@pytest.mark.fault
def test_a_replica_that_stands_still_is_named(cluster: gradwire.LocalCluster) -> None:
    with train(cluster, stages=1, cuts=None, stall_seconds=2.0) as trainer:
        trainer.step(*make_batch(0))
        servers = {server.server: server.address for server in cluster.status().servers}
        port = int(servers[trainer.servers[1]].rpartition(":")[2])
        (frozen,) = [
            process
            for process in map(psutil.Process, cluster.process_ids)
            if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in process.net_connections())
        ]
        frozen.suspend()
        try:
            began = time.monotonic()
            with pytest.raises(gradwire.GradwireError, match=trainer.servers[1]):
                trainer.step(*make_batch(1))
            assert time.monotonic() - began < 15
        finally:
            frozen.resume()


@pytest.mark.fault
def test_a_replica_that_dies_in_a_step_is_named() -> None:
    with gradwire.local(stage_servers=2) as cluster:
        with train(cluster, stages=1, cuts=None) as trainer:
            trainer.step(*make_batch(0))
            victim = trainer.servers[1]
            results = trainer.run([make_batch(1)], steps=100_000, progress=False)
            next(results)
            os.kill(cluster.process_ids[-1], signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(gradwire.StageFailed) as caught:
                for _ in results:
                    pass
            assert time.monotonic() - began < 10
        assert any(name in str(caught.value) for name in (victim, "replica"))
        wait_until_free(cluster)


def test_a_codec_that_is_left_open_is_chosen_from_the_measured_links(cluster: gradwire.Cluster) -> None:
    with train(cluster, stages=1, cuts=None, compression="auto") as trainer:
        made = trainer.plan
        # Loopback carries more than any codec saves.
        assert made.compression == "none"
        assert "Mbit/s" in made.compression_reason
        assert made.shards_optimizer
        assert "why none: replicas' links carry" in str(made)
        trainer.step(*make_batch(0))
        check_weights(trainer.state_dict(), one_process(1))
