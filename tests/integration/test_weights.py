"""Models without memory, with weights from files: what is trained equals one process that has it all in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import gradwire
from gradwire_protocol.errors import DataError, ModelError, SettingsError
from gradwire_protocol.optimizer_state import tensor_bytes
from gradwire_protocol.safetensors_format import StoredTensor

WIDTH = 8
PLAN = gradwire.Plan(stages=2, microbatches=2)


class Body(nn.Module):
    """Weights tied between its ends, a table that no checkpoint has, buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(self.embedding(tokens))) * self.table
        return self.head(hidden + torch.tanh(self.second(hidden)))


class WithNewHead(nn.Module):
    """A body whose weights come from files, and a head that is new."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.classes = nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classes(self.body(tokens))


def make_real(make: Callable[[], nn.Module] = Body) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def make_meta(make: Callable[[], nn.Module] = Body) -> nn.Module:
    with gradwire.meta_parameters():
        return make().double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def make_batch(seed: int, classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, (6,), generator=generator), torch.randint(classes, (6,), generator=generator)


def state_for_file(model: nn.Module, *, keep: str = "embedding.weight", drop: str = "head.weight") -> dict[str, Any]:
    """A state dict with the tied tensor under one of its names, as save_file wants it."""
    assert torch.equal(model.state_dict()[keep], model.state_dict()[drop])
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != drop}


def save_sharded(state: dict[str, torch.Tensor], directory: Path, shards: int = 3) -> None:
    """As Hugging Face's save_pretrained does it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    places = {name: f"model-{index % shards:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of one model in each form, and what must be refused."""
    root: Path = tmp_path_factory.mktemp("weights")
    state = state_for_file(make_real())
    for name in ("whole", "damaged", "pickled", "narrow", "lossy", "misshapen", "missing", "other-name"):
        (root / name).mkdir()
    save_file(state, root / "whole/model.safetensors")
    save_sharded(state, root / "sharded")
    save_file(
        state_for_file(make_real(), keep="head.weight", drop="embedding.weight"), root / "other-name/a.safetensors"
    )
    save_file(
        {name: item.float() if item.is_floating_point() else item for name, item in state.items()},
        root / "narrow/a.safetensors",
    )
    save_file(state | {"first.weight": torch.zeros(WIDTH, WIDTH, dtype=torch.int64)}, root / "lossy/a.safetensors")
    save_file(state | {"first.weight": torch.zeros(WIDTH, 3).double()}, root / "misshapen/a.safetensors")
    save_file({name: item for name, item in state.items() if name != "second.bias"}, root / "missing/a.safetensors")
    (root / "damaged/a.safetensors").write_bytes((root / "whole/model.safetensors").read_bytes()[:-9])
    torch.save(state, root / "pickled/pytorch_model.bin")
    return root


@pytest.fixture(scope="module")
def cluster(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.LocalCluster]:
    (root / "leads-out").symlink_to(tmp_path_factory.mktemp("elsewhere"), target_is_directory=True)
    with gradwire.local(stage_servers=2, threads=1, weights_root=root) as cluster:
        yield cluster


def train(
    cluster: gradwire.Cluster, model: nn.Module, weights: Any, classes: int = 12, **changes: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    arguments = {"loss": F.cross_entropy, "example": make_batch(0, classes), "plan": PLAN} | changes
    with cluster.trainer(model, make_optimizer(model), weights=weights, **arguments) as trainer:
        losses = [trainer.step(*make_batch(seed, classes)).loss for seed in range(2)]
        return losses, trainer.state_dict()


def train_here(model: nn.Module, classes: int = 12) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = make_optimizer(model)
    losses = []
    for seed in range(2):
        optimizer.zero_grad()
        x, y = make_batch(seed, classes)
        parts = [F.cross_entropy(model(a), b) / 2 for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
        optimizer.step()
    return losses, model.state_dict()


def assert_equal(got: tuple[list[float], dict[str, Any]], expected: tuple[list[float], dict[str, Any]]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-10)
    assert list(got[1]) == list(expected[1])
    for name, tensor in expected[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


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


def test_the_root_of_a_local_cluster_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="weights_root is not valid"):
        gradwire.local(weights_root=tmp_path / "nowhere")
    command = [sys.executable, "-m", "gradwire", "up", "--weights-root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "weights_root is not valid" in done.stderr


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
