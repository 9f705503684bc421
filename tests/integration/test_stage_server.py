"""Stage servers over real gRPC, without a coordinator: equal to one process, and every refusal leaves them serving."""

from __future__ import annotations

import time

import grpc
import pytest
import torch
from stage_cluster import MEAN, SUM, Cluster, Reference, Stream, wait_until

from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.errors import (
    Aborted,
    FrameError,
    GradwireError,
    LimitExceeded,
    ModelError,
    OptimizerError,
    PlanError,
    RunNotFound,
    ServerBusy,
    SettingsError,
    StaleGeneration,
    Unreachable,
    from_rpc_error,
)
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

LAYOUTS = {
    "one server": {"A": [0, 1, 2]},
    "two servers": {"A": [0], "B": [1, 2]},
    "three servers": {"A": [0], "B": [1], "C": [2]},
    "virtual stages": {"A": [0, 2], "B": [1]},
}


def state_names(*names: tuple[str, str]) -> run_pb2.LoadState:
    items = [run_pb2.OptimizerStateName(parameter=parameter, state=state) for parameter, state in names]
    return run_pb2.LoadState(optimizer_state=items)


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
        assert (
            server.metric("gradwire_stage_busy_seconds_total", run="r", stage="1,2", replica="0", phase="forward") > 0
        )
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


def malformed() -> dict[str, tuple[list[bytes], type[GradwireError]]]:
    tensor = torch.zeros(2, 4, dtype=torch.float64)
    key = pb.MessageKey(run="r", generation=1, entry=2, value="x", direction=pb.DIRECTION_BATCH)

    def frames(header: pb.TensorHeader) -> list[bytes]:
        return list(encode_frames(header, payload_of(tensor)))

    good = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(tensor))
    gap = pb.TensorHeader(key=key, sequence=3, tensor=tensor_info(tensor))
    large = pb.TensorHeader(
        key=key,
        sequence=1,
        tensor=pb.TensorInfo(data_type=pb.DATA_TYPE_UINT8, shape=[2**30], size_bytes=2**30, codec=pb.CODEC_NONE),
    )
    result = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(tensor))
    result.key.direction = pb.DIRECTION_RESULT
    stage = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(tensor))
    stage.key.direction, stage.key.source_stage = pb.DIRECTION_FORWARD, 9
    integers = pb.TensorHeader(
        key=key,
        sequence=1,
        tensor=pb.TensorInfo(
            data_type=pb.DATA_TYPE_INT64, shape=[2, 4], size_bytes=64, codec=pb.CODEC_NONE, requires_grad=True
        ),
    )
    return {
        "garbage": ([b"\xff" * 40], FrameError),
        "truncated": ([frames(good)[0][:-3]], FrameError),
        "empty": ([b""], FrameError),
        "gap": (frames(gap), FrameError),
        "too large": ([pb.TensorFrame(header=large).SerializeToString()], LimitExceeded),
        "result": (frames(result), FrameError),
        "unknown stage": (frames(stage), FrameError),
        "gradient of integers": (frames(integers), FrameError),
    }


@pytest.mark.parametrize(("frames", "kind"), malformed().values(), ids=malformed().keys())
def test_malformed_frames_end_their_stream_only(frames, kind) -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        call = cluster.servers["A"].channel.stream_stream(
            "/gradwire_protocol.v1.StageService/Deliver",
            request_serializer=None,
            response_deserializer=pb.Receipt.FromString,
        )(iter(frames), timeout=5)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert type(from_rpc_error(caught.value)) is kind
        cluster.submit_step(*batch(4), 2)
        cluster.reports()


REFUSED = {
    "another server": (lambda r: setattr(r, "server", "Z"), StaleGeneration),
    "no run": (lambda r: setattr(r, "run", ""), FrameError),
    "no stages": (lambda r: setattr(r, "stages", 0), FrameError),
    "missing stage": (lambda r: setattr(r, "stages", 4), FrameError),
    "no loss form": (lambda r: setattr(r, "loss_form", 0), FrameError),
    "a precision that needs a scaled loss": (lambda r: setattr(r, "precision", pb.DATA_TYPE_FLOAT16), FrameError),
    "bad address": (lambda r: setattr(r.peers[0], "address", "nowhere"), SettingsError),
    "tensor twice": (lambda r: r.tensors.append(r.tensors[0]), FrameError),
    "bad shape": (lambda r: r.tensors[0].spec.shape.append(-1), FrameError),
    "bad type": (lambda r: setattr(r.tensors[0].spec, "data_type", 0), FrameError),
    "no holder": (lambda r: r.tensors[0].ClearField("holder_stages"), FrameError),
    "too large": (lambda r: r.tensors[0].spec.shape.extend([2**40]), LimitExceeded),
    "segment twice": (lambda r: r.segments.append(r.segments[0]), FrameError),
    "unknown tensor": (lambda r: setattr(r.segments[0].tensors[0], "tensor", "z"), FrameError),
    "backward route": (lambda r: setattr(r.segments[3].incoming[0], "producer_stage", 2), FrameError),
    "operator": (lambda r: setattr(r.segments[0].nodes[0], "target", "aten.system.default"), ModelError),
    "optimizer": (lambda r: setattr(r.optimizer, "name", "LBFGS"), OptimizerError),
}


@pytest.mark.parametrize(("change", "kind"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_runs_are_refused_and_leave_the_server_free(change, kind) -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        server = cluster.servers["A"]
        request = cluster.request("A")
        change(request)
        with pytest.raises(kind):
            server.call("Prepare", request)
        assert server.activity().run == ""
        server.call("Prepare", cluster.request("A"))


def entry_with(cluster: Cluster, rows: int = 2, **options) -> run_pb2.Entry:
    entry = cluster.next_entry(train_step=run_pb2.TrainStep(step=1, **options))
    entry.train_step.micro_batches.add(rows=rows)
    return entry


WHOLE = "0F0 1F0 2F0 2B0 1B0 0B0 UPDATE"


@pytest.mark.parametrize(
    ("program", "change", "kind"),
    [
        (WHOLE, lambda entry: setattr(entry, "number", 5), FrameError),
        (WHOLE, lambda entry: setattr(entry, "generation", 2), StaleGeneration),
        (WHOLE, lambda entry: entry.ClearField("train_step"), FrameError),
        (WHOLE, lambda entry: setattr(entry.train_step.micro_batches[0], "rows", 0), FrameError),
        ("0F0 1F0 2F0", lambda entry: None, PlanError),
        ("0B0 0F0 1F0 2F0 2B0 1B0 UPDATE", lambda entry: None, PlanError),
        ("0F0 0F0 1F0 2F0 2B0 1B0 UPDATE", lambda entry: None, PlanError),
        ("0F1 1F0 2F0 2B0 1B0 0B1 UPDATE", lambda entry: None, PlanError),
        ("0F0 1F0 2F0 UPDATE 2B0 1B0 0B0", lambda entry: None, PlanError),
    ],
)
def test_wrong_entries_end_the_run(program, change, kind) -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        entry = entry_with(cluster)
        change(entry)
        cluster.streams["A"].submit(entry, program)
        assert type(cluster.streams["A"].failure()) is kind
        wait_until(lambda: cluster.servers["A"].activity().run == "")


def test_a_failing_action_is_named_and_frees_the_server() -> None:
    with Cluster(LAYOUTS["two servers"]) as cluster:
        cluster.open()
        x, y = batch(4)
        cluster.submit_step(x[:, :3].contiguous(), y, 2)
        error = cluster.streams["A"].failure()
        assert isinstance(error, ModelError)
        assert "Stage 0 failed in action 0F0 of entry 2 (forward of micro-batch 0): " in str(error)
        assert "aten.linear.default" in str(error)
        wait_until(lambda: cluster.servers["A"].activity().run == "")


def test_wrong_hyperparameters_keep_their_class() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        x, y = batch(2)
        entry = entry_with(cluster)
        cluster.send_batch(entry.number, x, y, 1)
        cluster.streams["A"].submit(entry, WHOLE)
        error = cluster.streams["A"].failure()
        assert isinstance(error, OptimizerError)
        assert "Stages 0, 1, 2 failed in action UPDATE of entry 2" in str(error)


def test_wrong_state_is_refused() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.prepare()
        server = cluster.servers["A"]
        cluster.streams["A"] = Stream(server)
        cluster.senders["A"] = FrameSender(server.channel, "A")
        entry = cluster.next_entry(load_state=run_pb2.LoadState())
        cluster.send("A", 1, 0, "w", torch.zeros(4, 5, dtype=torch.float64), pb.DIRECTION_STATE)
        cluster.streams["A"].submit(entry)
        error = cluster.streams["A"].failure()
        assert isinstance(error, FrameError)
        assert "'w'" in str(error)
        assert "[4, 5]" in str(error)


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


@pytest.mark.parametrize(
    ("kind", "error", "part"),
    [
        ({"save_state": run_pb2.SaveState(directory="../a", token="t")}, SettingsError, "relative"),
        ({"save_state": run_pb2.SaveState(directory="a", token="/")}, FrameError, "wrong token"),
        ({"load_state": run_pb2.LoadState(checkpoint=run_pb2.StoredState(directory="/a"))}, SettingsError, "relative"),
        ({"load_state": run_pb2.LoadState(checkpoint=run_pb2.StoredState(directory="a"))}, FrameError, "no hash"),
        ({"load_state": state_names(("w", ""))}, FrameError, "wrong name"),
        ({"load_state": state_names(("w", "s" * 65))}, FrameError, "wrong name"),
        ({"load_state": state_names(("w", "step"), ("w", "step"))}, FrameError, "twice"),
    ],
)
def test_entries_of_checkpoints_are_checked(kind, error, part) -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        cluster.open()
        cluster.streams["A"].submit(cluster.next_entry(**kind))
        failure = cluster.streams["A"].failure()
        assert isinstance(failure, error)
        assert part in str(failure)


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


def test_calls_without_a_run_are_refused() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        assert isinstance(Stream(cluster.servers["A"]).failure(), RunNotFound)
        with pytest.raises(grpc.RpcError) as caught:
            list(cluster.collect(1))
        assert isinstance(from_rpc_error(caught.value), RunNotFound)
        cluster.open()
        assert isinstance(Stream(cluster.servers["A"]).failure(), ServerBusy)
