"""Models without memory, with weights from files: what is trained equals one process that has it all in memory."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from weights_subject import (
    PLAN,
    WithNewHead,
    assert_equal,
    make_batch,
    make_meta,
    make_optimizer,
    make_real,
    save_sharded,
    train,
    train_here,
    write_weights,
)

import gradwire
from gradwire_protocol.errors import ModelError
from gradwire_protocol.optimizer_state import tensor_bytes
from gradwire_protocol.safetensors_format import StoredTensor


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=2, threads=1, weights_root=root) as cluster:
        yield cluster


@pytest.mark.parametrize("where", ["whole", "whole/model.safetensors", "sharded", "other-name"])
def test_weights_that_the_client_reads_train_as_in_one_process(
    cluster: gradwire.LocalCluster, root: Path, where: str
) -> None:
    model = make_meta()
    assert_equal(train(cluster, model, root / where), train_here(make_real()))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("where", ["whole", "sharded"])
def test_weights_that_the_servers_read_train_as_in_one_process(cluster: gradwire.LocalCluster, where: str) -> None:
    losses, state = train(cluster, make_meta(), gradwire.ServerWeights(where))
    expected_losses, expected = train_here(make_real())
    # What no graph uses is on no server, and stays as the module has it.
    assert {name for name in state if state[name].is_meta} == {"unused.weight", "unused.bias"}
    used = [name for name in expected if not name.startswith("unused")]
    assert_equal(
        (losses, {name: state[name] for name in used}), (expected_losses, {name: expected[name] for name in used})
    )


@pytest.mark.parametrize("kind", [gradwire.FileWeights, gradwire.ServerWeights])
def test_below_a_prefix_weights_come_from_files_and_the_rest_from_the_module(
    cluster: gradwire.LocalCluster, root: Path, kind: Any
) -> None:
    whole = WithNewHead(make_real()).double()
    mixed = WithNewHead(make_meta()).double()
    mixed.classes.load_state_dict(whole.classes.state_dict())
    where = root / "whole" if kind is gradwire.FileWeights else "whole"
    losses, state = train(cluster, mixed, kind(where, prefix="body."), classes=3)
    expected_losses, expected = train_here(whole, classes=3)
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    for name, tensor in expected.items():
        if "unused" not in name or kind is gradwire.FileWeights:
            torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-10)


def test_files_of_a_narrower_type_are_widened(cluster: gradwire.LocalCluster, root: Path) -> None:
    expected = train_here(make_real().float().double())
    assert_equal(train(cluster, make_meta(), root / "narrow"), expected)
    assert train(cluster, make_meta(), gradwire.ServerWeights("narrow"))[0] == pytest.approx(expected[0], rel=1e-10)


def test_a_loss_with_weights_of_its_own_takes_none_from_files(cluster: gradwire.LocalCluster, root: Path) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 12).double())
    in_memory = train(cluster, make_real(), None, loss=loss)
    assert_equal(train(cluster, make_meta(), root / "whole", loss=loss), in_memory)
    with pytest.raises(ModelError, match=r"The loss has tensors.*loss\.weight.*as a function"):
        train(cluster, make_meta(), gradwire.ServerWeights("whole"), loss=loss)


def state_bytes_received(cluster: gradwire.LocalCluster) -> dict[str, float]:
    """Bytes of state that each stage server has received for its run, by its own count."""
    received = {}
    for server in cluster.status().servers:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        received[server.server] = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("gradwire_transfer_bytes_total{") and 'kind="state"' in line
        )
    return received


@pytest.mark.parametrize("kind", [gradwire.FileWeights, gradwire.ServerWeights])
def test_each_tensor_is_read_once_and_sent_once_to_each_server_that_holds_it(
    cluster: gradwire.LocalCluster, root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda stored: (reads.append(stored.name), read(stored))[1])
    model = make_meta()
    on_server = kind is gradwire.ServerWeights
    weights = kind("whole" if on_server else root / "whole")
    with cluster.trainer(
        model, make_optimizer(model), loss=F.cross_entropy, example=make_batch(0), plan=PLAN, weights=weights
    ) as trainer:
        received = state_bytes_received(cluster)
        sizes = {spec.name: tensor_bytes(spec) for spec in trainer.exported.proto.tensors}
        layout = trainer._layout.servers
    holders = [name for server in layout for name in server.tensors]
    assert holders.count("embedding.weight") == 2  # tied over both stages
    # Tables that no file holds go from here in either case.
    by_client = {"table"} if on_server else set(holders)
    for server in layout:
        assert received[server.server] == sum(sizes[name] for name in server.tensors if name in by_client)
    in_files = {*holders, "unused.weight", "unused.bias"} - {"table"}
    assert sorted(reads) == ([] if on_server else sorted(in_files))


def words_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    # Hugging Face's own loss is computed in float32.
    return F.cross_entropy(output.logits.transpose(1, 2), target)


@pytest.mark.parametrize("on_server", [False, True])
def test_a_hugging_face_model_trains_from_the_files_that_it_saves(
    cluster: gradwire.LocalCluster, root: Path, on_server: bool
) -> None:
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        n_positions=8,
        vocab_size=40,
        use_cache=False,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    real = GPT2LMHeadModel(config)
    real.save_pretrained(root / "gpt2", max_shard_size="8KB")
    assert (root / "gpt2/model.safetensors.index.json").exists()
    real = real.double()
    with gradwire.meta_parameters():
        model = AutoModelForCausalLM.from_config(config).double()
    batch = (torch.arange(16).reshape(2, 8), torch.arange(16).reshape(2, 8) + 1)
    weights = gradwire.ServerWeights("gpt2") if on_server else root / "gpt2"
    with cluster.trainer(
        model, make_optimizer(model), loss=words_loss, example=batch, plan=PLAN, weights=weights
    ) as trainer:
        loss = trainer.step(*batch).loss
        state = trainer.state_dict()
    optimizer = make_optimizer(real)
    expected = words_loss(real(batch[0]), batch[1])
    expected.backward()
    optimizer.step()
    assert_equal(([loss], state), ([expected.item()], real.state_dict()))


@pytest.mark.parametrize("on_server", [False, True])
def test_a_run_with_weights_from_files_can_be_saved_and_continued(
    cluster: gradwire.LocalCluster, root: Path, tmp_path: Path, on_server: bool
) -> None:
    model = make_meta()
    weights = gradwire.ServerWeights("whole") if on_server else root / "whole"
    arguments = {"loss": F.cross_entropy, "example": make_batch(0), "plan": PLAN, "weights": weights}
    with cluster.trainer(model, make_optimizer(model), **arguments) as trainer:
        trainer.step(*make_batch(0))
        trainer.save(tmp_path / "saved")
    with cluster.trainer(model, make_optimizer(model), **arguments) as trainer:
        trainer.load(tmp_path / "saved")
        trainer.step(*make_batch(1))
        state = trainer.state_dict()
    for name, tensor in train_here(make_real())[1].items():
        if "unused" not in name or not on_server:
            torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-10)


class Peak:
    """The largest resident memory of this process inside the block, beyond that at its start."""

    def __enter__(self) -> Peak:
        self._start, self._largest, self._done = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._largest - self._start) / 2**20

    def _now(self) -> int:
        return int(psutil.Process().memory_info().rss)

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._largest = max(self._largest, self._now())


def test_the_client_never_holds_many_weights(cluster: gradwire.LocalCluster, root: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(20)))

    with gradwire.meta_parameters():
        model = make()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    assert size == 320
    save_sharded({f"{index}.weight": torch.zeros(2048, 2048) for index in range(20)}, root / "big")
    example = (torch.zeros(2, 2048), torch.zeros(2, 2048))
    peaks = {}
    for weights in (gradwire.ServerWeights("big"), gradwire.FileWeights(root / "big")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            Peak() as peak,
            cluster.trainer(model, optimizer, loss=F.mse_loss, example=example, plan=PLAN, weights=weights) as trainer,
        ):
            assert trainer.evaluate([example]) == 0
        peaks[type(weights).__name__] = peak.megabytes
    assert peaks["ServerWeights"] < 40
    assert peaks["FileWeights"] < 140
