"""Tensor-parallel stage servers over real gRPC, without a coordinator: equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shard_grid import SHAPES, SHARDS, SPLITS, WIDTH, Grid, Reference, adam, batch, close, made_state, reference_step
from stage_cluster import StageServer, wait_until

from gradwire_protocol.checkpoint.directory import partial_path
from gradwire_protocol.errors import FrameError, GradwireError
from gradwire_protocol.splits import part_ranges
from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

GRIDS = {
    "two positions": ([[0], [1]], 1, {}),
    "one position": ([[0, 1]], 1, {}),
    "recomputation": ([[0], [1]], 1, {"recompute": True}),
    "two replicas": ([[0], [1]], 2, {}),
    "two replicas that share the optimizer's state": ([[0, 1]], 2, {"shard_optimizer": True}),
}


@pytest.mark.parametrize("backward", ["B", "IW"])
@pytest.mark.parametrize(("positions", "replicas", "settings"), GRIDS.values(), ids=GRIDS.keys())
def test_training_equals_one_process(
    positions: list[list[int]], replicas: int, settings: dict[str, Any], backward: str
) -> None:
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sizes = [(8, 4), (7, 2), (5, 3)]
    with Grid(positions, replicas, **settings) as grid:
        grid.open()
        options = {"max_gradient_norm": 0.5, "return_gradients": True}
        entries = [
            grid.step(*batch(rows, seed), parts, backward, **options) for seed, (rows, parts) in enumerate(sizes)
        ]
        for seed, (rows, _) in enumerate(sizes):
            loss, norm, gradients = reference_step(model, optimizer, *batch(rows, seed), 0.5)
            reports = grid.reports()
            last = len(positions) - 1
            for shard in range(SHARDS):
                parts = [part for replica in range(replicas) for part in reports[replica, last, shard].losses]
                assert sum(part.sum for part in parts) / rows == pytest.approx(loss, rel=1e-12)
            assert {report.gradient_norm for report in reports.values()} == {reports[0, 0, 0].gradient_norm}
            assert reports[0, 0, 0].gradient_norm == pytest.approx(norm, rel=1e-12)
            returned = {key.value: value for _, key, value in grid.collect(entries[seed])}
            close(returned, gradients)
        state = grid.state()
        close({name: value for (name, what), value in state.items() if not what}, dict(model.state_dict()))
        for name, parameter in model.named_parameters():
            close(state[name, "exp_avg"], optimizer.state[parameter]["exp_avg"])
            close(float(state[name, "step"]), 3.0)
        # Whole tensors go back in, and training goes on.
        grid.load(state, weight_version=3)
        entry = grid.step(*batch(6, 9), 2, backward, max_gradient_norm=0.5)
        reference_step(model, optimizer, *batch(6, 9), 0.5)
        grid.reports()
        assert not list(grid.collect(entry))
        close({name: value for (name, what), value in grid.state().items() if not what}, dict(model.state_dict()))


@pytest.mark.parametrize("compression", ["int8", "topk(density=0.3)", "powersgd(rank=1)"])
def test_what_all_shards_have_stays_the_same_bit_by_bit(compression: str) -> None:
    """Codecs lose something, and on all shards the same of it."""
    with Grid([[0, 1]], 2, compression=compression) as grid:
        grid.open()
        for seed in range(3):
            grid.step(*batch(8, seed), 4, max_gradient_norm=0.5)
        for _ in range(3):
            grid.reports()
        for name in SHAPES:
            held = [held_by(server)[name] for server in grid.servers.values()]
            for tensor, (_, _, shard) in zip(held, grid.servers, strict=True):
                assert torch.equal(tensor, held[shard if name in SPLITS else 0])


def held_by(server: StageServer) -> dict[str, torch.Tensor]:
    held = server.stage_service.holder.current
    assert held is not None
    return held.run.tensors


@pytest.mark.parametrize("shared", [False, True])
def test_one_shard_writes_whole_tensors(shared: bool, tmp_path: Path) -> None:
    positions = [[0], [1]]
    with Grid(positions, 2, checkpoint_root=tmp_path, shard_optimizer=shared) as grid:
        grid.open()
        grid.step(*batch(8), 4)
        grid.reports()
        partial_path(tmp_path / "saved", "token").mkdir()
        entry = grid.next_entry(save_state=run_pb2.SaveState(directory="saved", token="token"))
        grid.submit(entry)
        replies = {
            place: grid.streams[place].replies(2 if (place[0], place[2]) == (0, 0) else 1) for place in grid.servers
        }
        files = {
            file.name
            for found in replies.values()
            for reply in found
            if reply.HasField("saved")
            for file in reply.saved.files
        }
        written = {}
        for name in files:
            written |= load_file(partial_path(tmp_path / "saved", "token") / name)
        state = grid.state()
        assert set(written) == {f"{name}/{what}" if what else name for name, what in state}
        for (name, what), value in state.items():
            assert torch.equal(written[f"{name}/{what}" if what else name], torch.as_tensor(value))
        for name, shape in SHAPES.items():
            assert written[name].shape == written[f"{name}/exp_avg"].shape == shape


def test_results_come_from_one_shard() -> None:
    with Grid([[0], [1]], 2) as grid:
        grid.open()
        x, _ = batch(6)
        entry = grid.next_entry(predict=run_pb2.Predict())
        entry.predict.micro_batches.extend(grid.send_batch(entry.number, x, None, 2))
        for (replica, position, _), stream in grid.streams.items():
            stream.submit(entry, f"{position}F{replica}")
        grid.reports()
        found = {key.micro_batch: (place, value) for place, key, value in grid.collect(entry.number)}
        assert [found[replica][0] for replica in (0, 1)] == [(0, 1, 0), (1, 1, 0)]
        close(torch.cat([found[replica][1] for replica in (0, 1)]), Reference()(x).detach())


def test_what_shards_exchange_is_counted_and_its_waits_are_named() -> None:
    with Grid([[0], [1]]) as grid:
        grid.open()
        # Shard 1 of the first stage does not come.
        entry = grid.next_entry(train_step=run_pb2.TrainStep(step=1))
        entry.train_step.hyperparameters.groups.append(adam(0.1))
        entry.train_step.micro_batches.extend(grid.send_batch(entry.number, *batch(4), 1))
        grid.streams[0, 0, 0].submit(entry, "0F0 0B0 UPDATE")
        server = grid.servers[0, 0, 0]
        words = "part of micro-batch 0 (0F/s/w) from shard 1 of its stage"
        wait_until(lambda: server.activity().waiting_for == words)
        assert server.activity().wait.server == grid.servers[0, 0, 1].name
        assert server.activity().phase == "wait-exchange"
        sent = {"run": "r", "peer": "0-0-1", "direction": "sent", "kind": "group", "codec": "none"}
        wait_until(lambda: server.metric("gradwire_transfer_bytes_total", **sent) == 4 * WIDTH * 8)
        grid.streams[0, 0, 1].submit(entry, "0F0 0B0 UPDATE")
        for shard in range(SHARDS):
            grid.streams[0, 1, shard].submit(entry, "1F0 1B0 UPDATE")
        # The others may find everything there when they come to it.
        assert grid.reports()[0, 0, 0].timing.idle_seconds["wait-exchange"] > 0


def test_a_failure_names_the_shard() -> None:
    with Grid([[0, 1]]) as grid:
        grid.open()
        entry = grid.next_entry(load_state=run_pb2.LoadState())
        for place in grid.servers:
            for name, value in made_state().items():
                # Parts, where wholes are expected.
                first, end = part_ranges([len(value)], SHARDS, place[2])[0]
                grid.send(place, entry.number, 0, name, value[first:end].clone(), pb.DIRECTION_STATE)
        grid.submit(entry)
        for shard in range(SHARDS):
            with pytest.raises(
                FrameError, match=rf"Stages 0, 1 \(shard {shard}\) failed .*'w1' does not fit"
            ) as caught:
                grid.streams[0, 0, shard].report()
            assert isinstance(caught.value, GradwireError)
            assert caught.value.expected.startswith("shape [4, 4]")
