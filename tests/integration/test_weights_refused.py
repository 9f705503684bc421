"""Weights that cannot be used are refused before anything is trained, and the error says what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weights_subject import make_meta, train, write_weights

import gradwire
from gradwire_protocol.errors import DataError, ModelError, SettingsError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cluster(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.LocalCluster]:
    (root / "leads-out").symlink_to(tmp_path_factory.mktemp("elsewhere"), target_is_directory=True)
    with gradwire.local(stage_servers=2, threads=1, weights_root=root) as cluster:
        yield cluster


REFUSED = [
    ("pickled", DataError, r"pytorch_model.bin is a pickle.*safetensors.torch.save_file"),
    ("damaged", DataError, r"damaged/a.safetensors is not a sound.*truncated"),
    ("missing", DataError, r"no tensor 'second.bias' in .*missing"),
    ("misshapen", DataError, r"'first.weight' in .*misshapen/a.safetensors.*shape \[8, 8\].*shape \[8, 3\]"),
    ("lossy", DataError, r"'first.weight' in .*lossy/a.safetensors.*lose precision.*F64.*I64"),
]


@pytest.mark.parametrize(("where", "error", "message"), REFUSED)
def test_what_the_client_cannot_use_is_refused_before_a_run_is_made(
    cluster: gradwire.LocalCluster, root: Path, where: str, error: type[Exception], message: str
) -> None:
    runs = len(cluster.status().runs)
    with pytest.raises(error, match=message):
        train(cluster, make_meta(), root / where)
    assert len(cluster.status().runs) == runs


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        *REFUSED,
        ("nowhere", SettingsError, "nowhere' is not there"),
        ("leads-out", SettingsError, "leads out of its root directory through a link"),
        ("whole/model.safetensors", SettingsError, "is not a directory of weights"),
        ("../weights", SettingsError, "not a relative path"),
        ("/etc", SettingsError, "not a relative path"),
    ],
)
def test_what_the_servers_cannot_use_ends_the_run_with_the_reason(
    cluster: gradwire.LocalCluster, where: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(cluster, make_meta(), gradwire.ServerWeights(where))


def test_a_model_without_contents_needs_weights(cluster: gradwire.LocalCluster, root: Path) -> None:
    with pytest.raises(ModelError, match=r"meta device.*first.weight.*give weights="):
        train(cluster, make_meta(), None)
    with pytest.raises(ModelError, match=r"meta device.*below their prefix.*first.weight"):
        train(cluster, make_meta(), gradwire.FileWeights(root / "whole", prefix="body."))
    with pytest.raises(SettingsError, match="weights is not valid"):
        train(cluster, make_meta(), 3)


def test_the_root_of_a_local_cluster_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="weights_root is not valid"):
        gradwire.local(weights_root=tmp_path / "nowhere")
    command = [sys.executable, "-m", "gradwire", "up", "--weights-root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "weights_root is not valid" in done.stderr
