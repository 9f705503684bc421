"""Stage servers over real gRPC, without a coordinator: equal to one process, and every refusal leaves them serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stage_cluster import Cluster, StageServer, wait_until
from stage_model import MEAN, SUM, Reference

from gradwire_protocol.errors import (
    Aborted,
    ServerBusy,
    StaleGeneration,
    Unreachable,
)
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.service import StageService

LAYOUTS = {
    "one server": {"A": [0, 1, 2]},
    "two servers": {"A": [0], "B": [1, 2]},
    "three servers": {"A": [0], "B": [1], "C": [2]},
    "virtual stages": {"A": [0, 2], "B": [1]},
}


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 4, dtype=torch.float64, generator=generator) for _ in range(2))


def reference_step(model: Reference, optimizer: torch.optim.Optimizer, x, y, max_norm: float | None) -> float:
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("form", [MEAN, SUM], ids=["mean", "sum and weight"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_training_equals_one_process(layout, form) -> None:
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sizes = [(8, 2), (7, 3), (3, 3), (5, 1)]
    with Cluster(layout, form) as cluster:
        cluster.open()
        # Two steps at once are open: entries, batches and programs run ahead of the reports.
        for index, (rows, parts) in enumerate(sizes):
            cluster.submit_step(*batch(rows, index), parts, rate=0.1 / (index + 1), max_gradient_norm=0.5)
        for index, (rows, _) in enumerate(sizes):
            optimizer.param_groups[0]["lr"] = 0.1 / (index + 1)
            loss = reference_step(model, optimizer, *batch(rows, index), 0.5)
            reports = cluster.reports()
            assert cluster.loss(reports) == pytest.approx(loss, rel=1e-12)
            assert {report.weight_version for report in reports.values()} == {index + 1}
            assert len({report.gradient_norm for report in reports.values()}) == 1
        state = cluster.state()
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_gradients_come_back_as_the_optimizer_saw_them() -> None:
    model = Reference()
    x, y = batch(6)
    torch.nn.functional.mse_loss(model(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with Cluster(LAYOUTS["three servers"]) as cluster:
        cluster.open()
        entry = cluster.submit_step(x, y, 4, max_gradient_norm=0.1, return_gradients=True)
        reports = cluster.reports()
        gradients = {key.value: tensor for key, tensor in cluster.collect(entry)}
    assert gradients.keys() == {"w", "a", "b", "v"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, getattr(model, name).grad, rtol=0, atol=1e-12)
    assert reports["A"].gradient_norm == pytest.approx(norm.item(), rel=1e-12)


def test_evaluation_and_prediction_change_nothing() -> None:
    model = Reference()
    x, y = batch(5)
    with Cluster(LAYOUTS["virtual stages"]) as cluster:
        cluster.open()
        cluster.submit_forward("evaluate", x, y, 2)
        expected = torch.nn.functional.mse_loss(model(x), y).item()
        assert cluster.loss(cluster.reports()) == pytest.approx(expected, rel=1e-12)
        entry = cluster.submit_forward("predict", x, None, 3)
        cluster.reports()
        parts = {key.micro_batch: tensor for key, tensor in cluster.collect(entry)}
        assert sorted(parts) == [0, 1, 2]
        torch.testing.assert_close(
            torch.cat([parts[index] for index in range(3)]), model(x).detach(), rtol=0, atol=1e-12
        )
        for name, value in cluster.state().items():
            assert torch.equal(value, model.state_dict()[name])


def test_the_time_of_every_entry_is_accounted_for() -> None:
    with Cluster(LAYOUTS["two servers"]) as cluster:
        cluster.open()
        for seed in range(3):
            cluster.submit_step(*batch(4, seed), 2)
            for report in cluster.reports().values():
                timing = report.timing
                spent = sum(timing.busy_seconds.values()) + sum(timing.idle_seconds.values())
                assert spent == pytest.approx(timing.window_seconds, abs=1e-9)
                assert timing.busy_seconds["forward"] > 0
                assert timing.busy_seconds["backward"] > 0
        server = cluster.servers["B"]
        labels = {"run": "r", "stage": "1,2", "replica": "0", "shard": "0"}
        assert server.metric("gradwire_stage_busy_seconds_total", **labels, phase="forward") > 0
        sent = {"run": "r", "peer": "B", "direction": "sent", "kind": "forward", "codec": "none"}
        wait_until(lambda: cluster.servers["A"].metric("gradwire_transfer_bytes_total", **sent) == 3 * 4 * 4 * 8)
        assert server.metric("gradwire_loss", run="r", stage="1,2") > 0
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1))
        wait_until(lambda: server.metric("gradwire_loss", run="r", stage="1,2") is None)


def test_release_ends_a_wait_within_a_second() -> None:
    with Cluster(LAYOUTS["two servers"]) as cluster:
        cluster.open()
        entry = cluster.next_entry(train_step=run_pb2.TrainStep(step=1))
        entry.train_step.micro_batches.add(rows=2)
        cluster.streams["B"].submit(entry, "1F0 2F0 2B0 1B0 REDUCE UPDATE")
        server = cluster.servers["B"]
        wait_until(lambda: server.activity().waiting_for != "")
        activity = server.activity()
        assert activity.waiting_for == "forward of micro-batch 0 (value 'h') from stage 0"
        assert (activity.run, activity.entry, activity.action) == ("r", 2, "1F0")
        server.call("Release", stage_pb2.ReleaseRequest(run="other", generation=9))
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=0))
        assert server.activity().run == "r"
        start = time.monotonic()
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1, reason="the test says so"))
        assert time.monotonic() - start < 1
        error = cluster.streams["B"].failure()
        assert isinstance(error, Aborted)
        assert "the test says so" in str(error)
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1))
        assert server.activity().run == ""
        server.call("Prepare", cluster.request("B", run="next"))


def test_a_prepare_that_comes_late_or_again_is_refused() -> None:
    """Nobody would ever release the server from it."""
    with Cluster(LAYOUTS["two servers"]) as cluster:
        server = cluster.servers["B"]
        # Overtaken by the release.
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1))
        with pytest.raises(StaleGeneration, match=r"Run r has ended.*generation 2 or later"):
            server.call("Prepare", cluster.request("B"))
        assert server.activity().run == ""
        server.call("Prepare", cluster.request("B", generation=2))
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=2))
        # A copy of it.
        with pytest.raises(StaleGeneration):
            server.call("Prepare", cluster.request("B", generation=2))
        server.call("Prepare", cluster.request("B", run="next"))


def test_a_release_while_it_is_prepared_frees_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    building, go_on = threading.Event(), threading.Event()
    build = StageService._build

    def slowly(self: StageService, *arguments: Any) -> Any:
        building.set()
        assert go_on.wait(10)
        return build(self, *arguments)

    with Cluster(LAYOUTS["two servers"]) as cluster, ThreadPoolExecutor(1) as pool:
        server = cluster.servers["B"]
        monkeypatch.setattr(StageService, "_build", slowly)
        prepared = pool.submit(server.call, "Prepare", cluster.request("B"), 15)
        assert building.wait(10)
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1))
        go_on.set()
        with pytest.raises(StaleGeneration):
            prepared.result()
        server.call("Prepare", cluster.request("B", run="next"))


def test_a_broken_execute_stream_frees_the_server() -> None:
    with Cluster(LAYOUTS["two servers"]) as cluster:
        cluster.open()
        cluster.streams["A"].call.cancel()
        wait_until(lambda: cluster.servers["A"].activity().run == "")
        # An orderly end frees it too.
        cluster.streams["B"].close()
        with pytest.raises(StopIteration):
            cluster.streams["B"].report()
        assert cluster.servers["B"].activity().run == ""


class _Call:
    """A call whose requests end like those of a good one, and which then turns out to be broken; gRPC may do that."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.breaks = callback
        return True


def test_a_stream_that_breaks_after_its_entries_have_ended_frees_the_server() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.prepare()
        server, call = cluster.servers["A"], _Call()
        assert isinstance(server, StageServer)
        # It waits for tensors that nobody sends.
        entry = cluster.next_entry(load_state=run_pb2.LoadState())
        replies = server.stage_service.Execute(iter([stage_pb2.ExecuteRequest(run="r", entry=entry)]), call)
        with ThreadPoolExecutor(1) as executor:
            reply = executor.submit(next, replies)
            wait_until(lambda: server.activity().waiting_for != "")
            call.breaks()
            with pytest.raises(Aborted, match="stream has ended"):
                reply.result(timeout=10)
        assert server.activity().run == ""


def test_a_run_without_execute_stream_expires() -> None:
    with Cluster(LAYOUTS["one server"], prepared_seconds=0.1) as cluster:
        cluster.prepare()
        wait_until(lambda: cluster.servers["A"].activity().run == "")


def test_a_held_server_refuses_other_runs_and_yields_to_a_new_generation() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        server = cluster.servers["A"]
        for identity in ({"run": "other"}, {"generation": 1}):
            with pytest.raises(ServerBusy, match="r, generation 1"):
                server.call("Prepare", cluster.request("A", **identity))
        cluster.submit_step(*batch(4), 2)
        cluster.reports()
        server.call("Prepare", cluster.request("A", generation=2))
        assert isinstance(cluster.streams["A"].failure(), Aborted)
        assert server.activity().generation == 2


def test_repeated_and_foreign_messages_are_dropped_and_counted() -> None:
    model, (x, y) = Reference(), batch(4)
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        sender, server = cluster.senders["A"], cluster.servers["A"]
        wrong = torch.full((4, 4), 9.0, dtype=torch.float64)

        def send(**key) -> None:
            identity = {"run": "r", "generation": 1, "entry": 2, "value": "x", "direction": pb.DIRECTION_BATCH, **key}
            header = pb.TensorHeader(key=pb.MessageKey(**identity), tensor=tensor_info(wrong))
            sender.send(header, payload_of(wrong))

        send(generation=7)
        send(run="other")
        send(entry=1)
        cluster.submit_step(x, y, 1)
        send()
        sender.flush(5)  # all are receipted, dropped or not
        expected = torch.nn.functional.mse_loss(model(x), y).item()
        assert cluster.loss(cluster.reports()) == pytest.approx(expected, rel=1e-12)
        for reason in ("other-generation", "other-run", "late"):
            assert server.metric("gradwire_messages_dropped_total", reason=reason) >= 1, reason
        repeated = server.metric("gradwire_messages_dropped_total", reason="repeated") or 0
        late = server.metric("gradwire_messages_dropped_total", reason="late")
        assert repeated + late == 2  # the step may have ended before the repeated one came


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_state_goes_on_on_another_layout(layout) -> None:
    def step(cluster: Cluster, seed: int) -> None:
        cluster.submit_step(*batch(4, seed), 2)
        cluster.reports()

    with Cluster(LAYOUTS["two servers"]) as first:
        first.open()
        step(first, 1)
        step(first, 2)
        entry = first.submit_fetch(optimizer_state=True)
        # What is collected is what was there, however much is trained meanwhile.
        first.reports()
        step(first, 3)
        saved = {(key.value, key.state): value.clone() for key, value in first.collect(entry) if value is not None}
        expected = first.state()
    assert {state for _, state in saved} == {"", "step", "exp_avg", "exp_avg_sq"}
    assert saved["w", "step"] == 2
    with Cluster(layout) as second:
        second.open()
        step(second, 5)
        second.load(saved, weight_version=2)
        assert {report.weight_version for report in second.reports().values()} == {2}
        step(second, 3)
        state = second.state()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_a_lost_peer_ends_the_run_of_the_others() -> None:
    with Cluster(LAYOUTS["two servers"]) as cluster:
        cluster.open()
        cluster.submit_step(*batch(4), 2)
        cluster.reports()
        cluster.servers["B"].service.server.stop(0).wait()
        entry = cluster.next_entry(train_step=run_pb2.TrainStep(step=2))
        entry.train_step.micro_batches.add(rows=4)
        cluster.send("A", entry.number, 0, "x", batch(4)[0], pb.DIRECTION_BATCH)
        cluster.streams["A"].submit(entry, "0F0 0B0 REDUCE UPDATE")
        error = cluster.streams["A"].failure()
        assert isinstance(error, Unreachable | Aborted)
        assert "stage server B" in str(error)
        wait_until(lambda: cluster.servers["A"].activity().run == "")
