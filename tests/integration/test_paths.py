"""Every path that comes from elsewhere, out of messages and out of files, stays below its root or is refused.

Outside the root lies what the attacks would like to find, whole and valid; whatever is opened or changed there is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from coordinator_cluster import Cluster, create
from safetensors.torch import save_file
from test_enrolment import enroll, serving
from wire_fields import NO_PATHS, PATHS, text_fields

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire.certs.tokens import TokenBook
from gradwire_coordinator.saves import RunSaves, Writer
from gradwire_protocol.checkpoint.files import record_of
from gradwire_protocol.checkpoint.manifest import Manifest, SavedOptimizer, parse_draft, parse_manifest
from gradwire_protocol.checkpoint.reader import StoredCheckpoint
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import CheckpointError, GradwireError, from_rpc_error
from gradwire_protocol.handover import take_over
from gradwire_protocol.roles import Role
from gradwire_protocol.shared_block import BlockError
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_protocol.weight_files import open_tensor_files
from gradwire_stage.checkpoint_writer import CheckpointWriter, Copied
from gradwire_stage.stored_state import StoredState
from gradwire_stage.weights import ServerWeights

TICKET = bytes(16)
DRAFT = Manifest(versions={}, step=1, seed=0, optimizer=SavedOptimizer(name="SGD", groups=()))
SPEC = graph_pb2.TensorSpec(
    name="w", names=["w"], kind=graph_pb2.TENSOR_KIND_PARAMETER, data_type=pb.DATA_TYPE_FLOAT32, shape=[2]
)

# Never taken. OUTSIDE stands for the absolute path of what lies outside.
HOSTILE = {
    "empty": "",
    "root": "/",
    "parent": "..",
    "parent's": "../outside",
    "through": "good/../../outside",
    "absolute": "OUTSIDE",
    "link": "link",
    "through a link": "link/inner",
    "dot": "./../outside",
    "nothing between": "good//../../outside",
    "nul": "good\0/../../outside",
    "line": "good\n",
    "backslashes": "..\\outside",
    "separator of lines": "..\u2028outside",
    "direction": "good\u202e/../../outside",
    "long": "../" * 2000 + "outside",
    "long name": "x" * 300,
    "very long": "x/" * 10_000 + "x",
}
# Names that look like paths to some: refused, or a name below the root.
ODD = {
    "division slash": "..\u2215outside",
    "fraction slash": "..\u2044outside",
    "full width": "\uff0e\uff0e\uff0foutside",
    "percent": "%2e%2e%2foutside",
    "home": "~",
    "drive": "C:outside",
    "variable": "$HOME",
    "star": "*",
}


class Opened:
    """The files that this process opens, lists, makes, renames or removes below a directory, on any thread."""

    def __init__(self) -> None:
        self.below = ""
        self.found: list[str] = []
        sys.addaudithook(self._see)  # for ever: there is no way back

    @contextmanager
    def watched(self, directory: Path) -> Iterator[list[str]]:
        self.below, self.found = str(directory), []
        try:
            yield self.found
        finally:
            self.below = ""

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.below or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        for each in arguments:
            if isinstance(each, str | bytes | os.PathLike):
                path = os.path.realpath(os.fsdecode(each))
                if path == self.below or path.startswith(self.below + "/"):
                    self.found.append(f"{event} {path}")


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


def write_checkpoint(directory: Path, names: dict[str, str] | None = None) -> Manifest:
    """Write a whole checkpoint of one tensor; names: what its manifest calls a file, in place of its own name."""
    directory.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    save_file({}, directory / "optimizer.safetensors")
    files = {path.name: record_of(path) for path in sorted(directory.iterdir())}
    manifest = DRAFT.model_copy(update={"files": {(names or {}).get(name, name): files[name] for name in files}})
    (directory / "manifest.json").write_text(manifest.to_text())
    return manifest


class Place:
    """A root, and what lies outside it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.outside = folder / "root", folder / "outside"
        write_checkpoint(self.root / "good")
        write_checkpoint(self.outside)
        write_checkpoint(self.outside / "inner")
        (self.root / "link").symlink_to("../outside")
        self.before = self.snapshot()
        self.cluster = Cluster(folder / "state", checkpoint_root=self.root)
        self.cluster.add_stages(2)
        self.run = create(self.cluster, 2).run
        self.authority = Authority.create(folder / "authority")

    def snapshot(self) -> dict[str, str]:
        """All that lies outside, by name."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(self.outside.rglob("*"))
        }

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.cluster.stub, method)(request, timeout=20)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    made.cluster.close()


# --- what is done with each


def begin_save(place: Place, path: str) -> None:
    request = coordinator_pb2.BeginSaveRequest(run=place.run, directory=path, manifest=DRAFT.model_dump_json())
    place.call("BeginSave", request)


def begin_save_with_files(place: Place, path: str) -> None:
    draft = json.dumps(DRAFT.model_dump(mode="json") | {"files": {path: {"size_bytes": 1, "sha256": "0" * 64}}})
    request = coordinator_pb2.BeginSaveRequest(run=place.run, directory="new", manifest=draft)
    assert parse_draft(DRAFT.model_dump_json()) == DRAFT
    place.call("BeginSave", request)


def inspect(place: Place, path: str) -> None:
    place.call("InspectCheckpoint", coordinator_pb2.InspectCheckpointRequest(directory=path))


def manifest_with_file(place: Place, path: str) -> None:
    """Read a checkpoint whose manifest, hash and all, names a file that way; as text, too, as a client gets it."""
    strange = place.root / "strange"
    shutil.rmtree(strange, ignore_errors=True)
    manifest = write_checkpoint(strange, {"model.safetensors": path})
    with pytest.raises(CheckpointError, match="not a file of a checkpoint"):
        parse_manifest(strange, manifest.to_text())
    StoredCheckpoint(strange, root=place.root)


def save_state(place: Place, path: str, token: str = "t") -> None:
    """Have a stage server write its part."""
    parts: queue.SimpleQueue[run_pb2.SavedPart] = queue.SimpleQueue()
    root = CheckpointRoot(place.root, "This stage server")
    writer = CheckpointWriter(root, stage=0, who="stage 0", advance=lambda: None)
    save = run_pb2.SaveState(directory=path, token=token)
    writer.start(Copied(entry=1, generation=1, weight_version=1, save=save), parts.put)
    part = parts.get(timeout=20)
    if part.HasField("failure"):
        raise CheckpointError(part.failure.message)


def load_stored(place: Place, path: str) -> None:
    StoredState(run_pb2.StoredState(directory=path), CheckpointRoot(place.root, "This stage server"))


def load_weights(place: Place, path: str) -> None:
    ServerWeights(run_pb2.LoadState(weights_directory=path), place.root, [SPEC])


def take_socket(place: Place, path: str) -> None:
    take_over(place.root, path, TICKET, 0.5)


def report_file(place: Place, path: str) -> None:
    """Have a stage server report a file of that name, and the coordinator put the checkpoint together."""
    outcomes: queue.SimpleQueue[run_pb2.SaveOutcome] = queue.SimpleQueue()
    root = CheckpointRoot(place.root, "The coordinator")
    saves = RunSaves(root, {0: Writer(0, "stage 0")}, lambda outcome, *_: outcomes.put(outcome))
    token = saves.begin("reported", DRAFT.model_dump_json())
    saves.check(run_pb2.SaveState(directory="reported", token=token))
    saves.dispatched(1)
    part = run_pb2.SavedPart(entry=1, weight_version=1)
    part.files.add(name=path, size_bytes=(place.outside / "model.safetensors").stat().st_size, sha256="0" * 64)
    saves.take(0, part)
    outcome = outcomes.get(timeout=20)
    saves.forget(1)
    saves.close()
    if outcome.HasField("failure"):
        raise CheckpointError(outcome.failure.message)


def enroll_as(place: Place, path: str) -> None:
    token = TokenBook(place.authority.directory).make(role=Role.STAGE, fingerprint=place.authority.fingerprint)
    with serving(place.authority.directory) as address:
        enroll(place.authority, address, token=str(token), name=path)


def enroll_with(place: Place, path: str) -> None:
    with serving(place.authority.directory) as address:
        enroll(place.authority, address, token=f"gradwire.stage.{path}")


def issue_for(place: Place, path: str) -> None:
    issue(place.authority, role=Role.CLIENT, name=path)


def index_with_shard(place: Place, path: str) -> None:
    weights = place.root / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    weights.mkdir()
    (weights / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": path}}))
    open_tensor_files(weights, root=place.root)


ATTACKS: dict[str, Callable[[Place, str], None]] = {
    "BeginSaveRequest.directory": begin_save,
    "BeginSaveRequest.manifest": begin_save_with_files,
    "InspectCheckpointRequest.directory": inspect,
    "InspectCheckpointReply.manifest": manifest_with_file,
    "SaveState.directory": save_state,
    "SaveState.token": lambda place, path: save_state(place, "good", path),
    "StoredState.directory": load_stored,
    "LoadState.weights_directory": load_weights,
    "OfferStreamRequest.socket": take_socket,
    "OfferSharedBlockRequest.socket": take_socket,
    "SavedFile.name": report_file,
    "EnrollRequest.name": enroll_as,
    "EnrollRequest.token": enroll_with,
    # From files and from the command line.
    "a shard in an index": index_with_shard,
    "certs issue --name": issue_for,
}
# What means something else: no weights from files at all; a name like any other, which is no name below the root.
HARMLESS = {
    ("LoadState.weights_directory", "empty"),
    ("EnrollRequest.name", "link"),
    ("certs issue --name", "link"),
}


def test_every_field_is_known_to_be_a_path_or_none() -> None:
    known = PATHS | {f"{message}.{field}" for message, fields in NO_PATHS.items() for field in fields.split()}
    assert text_fields() == known, "classify the fields that are new in wire_fields.py"
    assert not PATHS & {f"{message}.{field}" for message, fields in NO_PATHS.items() for field in fields.split()}
    assert set(ATTACKS) >= PATHS


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ATTACKS)
def test_hostile_paths_are_refused(place: Place, opened: Opened, field: str, name: str) -> None:
    path = HOSTILE[name].replace("OUTSIDE", str(place.outside))
    with opened.watched(place.outside) as found:
        if (field, name) in HARMLESS:
            ATTACKS[field](place, path)
        else:
            with pytest.raises((GradwireError, BlockError)):
                ATTACKS[field](place, path)
    assert found == []
    assert place.snapshot() == place.before


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("field", ATTACKS)
def test_odd_names_lead_nowhere_else(place: Place, opened: Opened, field: str, name: str) -> None:
    with opened.watched(place.outside) as found, suppress(GradwireError, BlockError):
        ATTACKS[field](place, ODD[name])
    assert found == []
    assert place.snapshot() == place.before


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "unnamed.txt"])
def test_files_that_are_links_out_of_the_root_are_not_opened(place: Place, opened: Opened, file: str) -> None:
    linked = place.root / "linked"
    shutil.rmtree(linked, ignore_errors=True)
    write_checkpoint(linked)
    (linked / file).unlink(missing_ok=True)
    target = place.outside / ("model.safetensors" if file == "unnamed.txt" else file)
    (linked / file).symlink_to(target)
    for attack in (inspect, load_stored):
        with opened.watched(place.outside) as found, pytest.raises(GradwireError, match="leads out of its root"):
            attack(place, "linked")
        assert found == []


def test_what_is_inside_is_taken_and_what_is_outside_is_seen(place: Place, opened: Opened) -> None:
    """Otherwise the refusals would say nothing."""
    with opened.watched(place.outside) as found:
        (place.root / "link" / "model.safetensors").read_bytes()
        list((place.root / "link").iterdir())
    assert len(found) == 2
    inspect(place, "good")
    load_stored(place, "good")
    begin_save(place, "another/deep/one")
    (place.root / "weights-inside").mkdir()
    shutil.copy(place.outside / "model.safetensors", place.root / "weights-inside")
    load_weights(place, "weights-inside")
    issue_for(place, "ada")
    enroll_as(place, "gpu-1")
