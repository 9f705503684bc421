"""Where stage servers keep checkpoints: roots that are missing, or are not one directory, are found out and named."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_subject import make_batches, make_model, make_trainer
from cluster_in_process import cluster_in_process

import gradwire
from gradwire_protocol.checkpoint.reader import check
from gradwire_protocol.errors import CheckpointError, GradwireError, SettingsError


@contextmanager
def stage_server(cluster: gradwire.LocalCluster, *flags: str) -> Iterator[None]:
    """Another stage server for a cluster, started with other flags."""
    before = len(cluster.status().servers)
    command = [sys.executable, "-m", "gradwire_stage", "--coordinator", cluster.address, *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while len(cluster.status().servers) == before:
                assert process.poll() is None
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


def test_roots_that_are_not_one_are_found_out(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    batches = make_batches(3)
    with gradwire.local(stage_servers=1, checkpoint_root=ours) as cluster:
        with make_trainer(cluster, make_model(), stages=1) as trainer:
            trainer.save("a", storage="server")
        for flags, words in (
            (("--checkpoint-root", str(theirs)), "does not see the directory that the coordinator has made"),
            ((), "has no directory of checkpoints"),
        ):
            with stage_server(cluster, *flags), make_trainer(cluster, make_model()) as trainer:
                with pytest.raises(CheckpointError, match=rf"by stage 1 \(server .*{words}"):
                    trainer.save("a", storage="server")
                trainer.step(*batches[0])
                assert check(ours / "a").step == 0
                # That one fails where it is read, and ends the run: the coordinator sees a checkpoint that is whole.
                with pytest.raises(
                    GradwireError, match=r"Stage 1 failed.*(no checkpoint at|no directory of checkpoints)"
                ):
                    trainer.load("a", storage="server")
    assert [path.name for path in ours.iterdir()] == ["a"]
    assert list(theirs.iterdir()) == []


def test_without_a_root_it_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    with (
        cluster_in_process(tmp_path / "state", stage_servers=1) as cluster,
        make_trainer(cluster, make_model(), stages=1) as trainer,
    ):
        for call in (trainer.save, trainer.load):
            with pytest.raises(
                SettingsError, match=r"The coordinator has no directory of checkpoints.*--checkpoint-root"
            ):
                call("a", storage="server")  # type: ignore[operator]
        trainer.step(*make_batches(1)[0])
        trainer.save(tmp_path / "a")
    with pytest.raises(SettingsError, match="checkpoint_root is not valid"):
        gradwire.local(checkpoint_root=tmp_path / "nowhere")
