"""What stage servers refuse, over real gRPC and without a coordinator: the reason is told, and they go on serving."""

from __future__ import annotations

import grpc
import pytest
import torch
from stage_cluster import Cluster, Stream, wait_until
from test_stage_server import LAYOUTS, batch

from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.errors import (
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
    from_rpc_error,
)
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb


def state_names(*names: tuple[str, str]) -> run_pb2.LoadState:
    items = [run_pb2.OptimizerStateName(parameter=parameter, state=state) for parameter, state in names]
    return run_pb2.LoadState(optimizer_state=items)


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


def test_calls_without_a_run_are_refused() -> None:
    with Cluster(LAYOUTS["one server"]) as cluster:
        assert isinstance(Stream(cluster.servers["A"]).failure(), RunNotFound)
        with pytest.raises(grpc.RpcError) as caught:
            list(cluster.collect(1))
        assert isinstance(from_rpc_error(caught.value), RunNotFound)
        cluster.open()
        assert isinstance(Stream(cluster.servers["A"]).failure(), ServerBusy)
