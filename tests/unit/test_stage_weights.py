"""What a stage server reads itself: what the entry names, below its root, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradwire_protocol.errors import DataError, GradwireError, SettingsError
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.settings import load_stage_settings
from gradwire_stage.weights import ServerWeights

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.mean": torch.ones(3)}


def spec(name: str, kind: str = "PARAMETER", *, persistent: bool = True) -> graph_pb2.TensorSpec:
    return graph_pb2.TensorSpec(
        name=name,
        names=[name],
        kind=graph_pb2.TensorKind.Value(f"TENSOR_KIND_{kind}"),
        persistent=persistent,
        data_type=pb.DATA_TYPE_FLOAT64,
        shape=STATE[name.removeprefix("model.")].shape if name.removeprefix("model.") in STATE else [1],
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/some").mkdir(parents=True)
    save_file(STATE, tmp_path / "root/some/model.safetensors")
    return tmp_path / "root"


def test_parameters_and_persistent_buffers_are_read_and_the_rest_is_left_to_the_client(root: Path) -> None:
    specs = [
        spec("layer.weight"),
        spec("layer.mean", "BUFFER"),
        spec("table", "BUFFER", persistent=False),
        spec("number", "CONSTANT"),
    ]
    weights = ServerWeights(run_pb2.LoadState(weights_directory="some"), root, specs)
    for item in specs[:2]:
        read = weights.read(item)
        assert read is not None
        assert torch.equal(read, STATE[item.name].double())
    assert [weights.read(item) for item in specs[2:]] == [None, None]


def test_of_what_shards_have_parts_of_the_whole_is_read(root: Path) -> None:
    part = spec("layer.weight")
    part.shape[:] = [2, 1]
    part.split.CopyFrom(graph_pb2.TensorSplit(dimension=1, sections=[3]))
    read = ServerWeights(run_pb2.LoadState(weights_directory="some"), root, [part]).read(part)
    assert read is not None
    assert torch.equal(read, STATE["layer.weight"].double())


def test_a_prefix_says_which_are_read(root: Path) -> None:
    load = run_pb2.LoadState(weights_directory="some", weights_prefix="model.")
    weights = ServerWeights(load, root, [spec("model.layer.weight"), spec("head")])
    read = weights.read(spec("model.layer.weight"))
    assert read is not None
    assert torch.equal(read, STATE["layer.weight"].double())
    assert weights.read(spec("head")) is None


def test_without_a_directory_nothing_is_read() -> None:
    assert ServerWeights(run_pb2.LoadState(), None, [spec("layer.weight")]).read(spec("layer.weight")) is None


@pytest.mark.parametrize(
    ("directory", "error", "message"),
    [
        ("some/model.safetensors", SettingsError, "not a directory"),
        ("nowhere", SettingsError, "not there"),
        ("../root/some", SettingsError, "not a relative path"),
        ("out", SettingsError, "leads out of its root"),
        (".", DataError, "no weights in"),
    ],
)
def test_what_is_not_a_directory_of_weights_below_the_root_is_refused(
    root: Path, directory: str, error: type[GradwireError], message: str
) -> None:
    (root / "out").symlink_to(root.parent)
    with pytest.raises(error, match=message):
        ServerWeights(run_pb2.LoadState(weights_directory=directory), root, [spec("layer.weight")])


def test_a_server_without_a_root_says_how_to_give_it_one() -> None:
    with pytest.raises(SettingsError, match=r"start every stage server with --weights-root"):
        ServerWeights(run_pb2.LoadState(weights_directory="some"), None, [])


def test_everything_is_found_before_anything_is_read(root: Path) -> None:
    with pytest.raises(DataError, match=r"no tensor 'lost'"):
        ServerWeights(run_pb2.LoadState(weights_directory="some"), root, [spec("layer.weight"), spec("lost")])


def test_the_root_is_a_directory_that_is_there(root: Path) -> None:
    flags = {"coordinator": "127.0.0.1:7070"}
    assert load_stage_settings(flags, None).weights_root is None
    assert load_stage_settings(flags | {"weights_root": root}, None).weights_root == root
    with pytest.raises(SettingsError, match="weights_root"):
        load_stage_settings(flags | {"weights_root": root / "nowhere"}, None)


def test_a_file_that_is_a_link_out_of_the_root_is_not_read(root: Path) -> None:
    outside = root.parent / "secret.safetensors"
    (root / "some/model.safetensors").rename(outside)
    (root / "some/model.safetensors").symlink_to(outside)
    with pytest.raises(SettingsError, match=r"weights file model.safetensors leads out of its root"):
        ServerWeights(run_pb2.LoadState(weights_directory="some"), root, [spec("layer.weight")])
